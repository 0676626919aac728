"""gather_kv and copy_pages: moves out of slots and of whole pages, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ...kernels.copy_pages import copy_pages
from ...kernels.gather_kv import gather_kv
from ...shapes import dtype_name
from ..page_views import PAGE_FORMS, kv_page_views
from .bit_patterns import bit_patterns
from .case import ConformanceCase
from .judge import moves_as_reference, refuses

__all__ = ["page_cases"]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
NUM_PAGES, PAGE_SIZE = 6, 3
NUM_SLOTS = NUM_PAGES * PAGE_SIZE
# More than 16 bits count, and than the blocks that a grid may have along an axis.
MANY = 70_001

SLOTS: dict[str, Callable[[], torch.Tensor]] = {
    "shuffled": lambda: torch.tensor([17, 0, 5, 9, 8]),
    "repeated": lambda: torch.tensor([4, 4, 16, 4]),
    "negative": lambda: torch.tensor([-1, 3, -(2**62), 1 - 2**32, 17]),
    "empty": lambda: torch.zeros(0, dtype=torch.int64),
    "200": lambda: torch.randint(-2, NUM_SLOTS, (200,)),
    "many": lambda: torch.randint(-2, NUM_SLOTS, (MANY,)),
    "strided": lambda: torch.stack([torch.randperm(NUM_SLOTS), torch.full((NUM_SLOTS,), 2**40)], 1)[:, 0],
}

# Numbers of heads, widths of keys and values.
SHAPES = [(1, 576, 512), (8, 64, 64), (40, 128, 128), (2, 192, 128), (3, 256, 256), (1, 1, 1), (2, 80, 13)]

# The two tensors of a copy, of any dtype.
Fill = Callable[..., torch.Tensor]
COPIED: dict[str, Callable[[Fill], tuple[torch.Tensor, ...]]] = {
    "between-two": lambda fill: (fill(NUM_PAGES, 2, 3, 8), fill(4, 2, 3, 8)),
    "permuted": lambda fill: (fill(2, NUM_PAGES, 8, 3).permute(1, 0, 3, 2), fill(NUM_PAGES, 2, 3, 8)),
    "page-axis-inside": lambda fill: (fill(NUM_PAGES, 2, 3, 8), fill(2, 3, NUM_PAGES, 8).permute(2, 0, 1, 3)),
    "gaps": lambda fill: (fill(NUM_PAGES, 4, 3, 9)[:, 1:3, :, :8], fill(NUM_PAGES + 1, 2, 5, 16)[1:, :, :3, ::2]),
    "interleaved": lambda fill: fill(NUM_PAGES, 2, 3, 8).unbind(1),
    "one-element-a-page": lambda fill: (fill(NUM_PAGES), fill(NUM_PAGES)),
    "large-pages": lambda fill: (fill(NUM_PAGES, 2, 16, 8, 129), fill(NUM_PAGES, 2, 16, 8, 129)),
    "pages-of-an-odd-width": lambda fill: (fill(NUM_PAGES, 3, 4099), fill(NUM_PAGES, 3, 4099)),
}


def page_cases() -> list[ConformanceCase]:
    """All cases of the two ops."""
    gathers: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"slots-{name}": partial(_gather, slots=slots) for name, slots in SLOTS.items()},
        **{f"{form}-HND": partial(_gather, form=form, layout="HND") for form in PAGE_FORMS},
        "sliced-NHD": partial(_gather, form="sliced"),
        **{dtype_name(dtype): partial(_gather, dtype=dtype) for dtype in (F16, BF16, I8, E4M3, E5M2)},
        **{
            f"heads-{heads}-widths-{dim}-{value_dim}-{dtype_name(dtype)}": partial(
                _gather, heads=heads, dim=dim, value_dim=value_dim, dtype=dtype
            )
            for heads, dim, value_dim in SHAPES
            for dtype in (F32, F16, BF16)
        },
        **{
            f"page-size-{n}": partial(_gather, page_size=n, slots=partial(torch.randperm, NUM_PAGES * n))
            for n in (1, 4, 32, 64, 256)
        },
        "many-pages": partial(_gather, slots=lambda: MANY - 1 - torch.randperm(50), num_pages=MANY, page_size=1),
    }
    cases = [ConformanceCase("gather_kv", name, moves_as_reference(gather_kv, make)) for name, make in gathers.items()]
    late = [*range(-200, 0), NUM_SLOTS, 0]
    for name, slots in (("beyond", [0, NUM_SLOTS, -1]), ("far-beyond", [0, 2**32, -1]), ("beyond-near-the-end", late)):
        make = partial(_gather, slots=partial(torch.tensor, slots))
        cases.append(ConformanceCase("gather_kv", f"refuses-a-slot-{name}", refuses(gather_kv, make, str(max(slots)))))
    return cases + _copy_cases()


def _copy_cases() -> list[ConformanceCase]:
    dtypes = (F32, F16, BF16, I8, E4M3, E5M2)
    makes: dict[str, Callable[[], dict[str, Any]]] = {
        **{name: partial(_copy, pages) for name, pages in COPIED.items()},
        **{f"within-one-{dtype_name(dtype)}": partial(_copy_within, dtype) for dtype in dtypes},
        **{
            f"{name}-{dtype_name(dtype)}": partial(_copy, COPIED[name], dtype=dtype)
            for name in ("gaps", "one-element-a-page", "pages-of-an-odd-width")
            for dtype in (F16, I8)
        },
        "shared-bytes": _copy_shared,
        "empty": partial(_copy, COPIED["between-two"], [], []),
        "100-pages": partial(_copy_many, 300, 100),
        "100-of-many-pages": partial(_copy_many, MANY, 100),
        "many-of-many-pages": partial(_copy_many, 2 * MANY, MANY),
    }
    cases = {name: moves_as_reference(copy_pages, make) for name, make in makes.items()}
    others = list(range(6, 100))
    refused: dict[str, tuple[list[int], list[int], str]] = {
        "a-source-beyond": ([0, NUM_PAGES], [1, 2], str(NUM_PAGES)),
        "a-negative-source": ([0, -1], [1, 2], "-1"),
        "a-target-beyond": ([0, 1], [2, 2**32], str(2**32)),
        "a-negative-target": ([0, 1], [-2, 3], "-2"),
        "a-target-twice": ([0, 1], [3, 3], "3"),
        "a-target-that-is-read": ([0, 1], [2, 0], "0"),
        "a-source-beyond-near-the-end": ([0] * 94 + [777, 0], [*others, 3, 4], "777"),
        "a-target-beyond-near-the-end": ([0] * 96, [*others, 777, 4], "777"),
        "a-target-twice-far-apart": ([0] * 96, [3, *others, 3], "3"),
    }
    for name, (src, dst, culprit) in refused.items():
        num_pages = NUM_PAGES if len(src) == 2 else 100
        cases[f"refuses-{name}"] = refuses(copy_pages, partial(_copy_within, F32, src, dst, num_pages), culprit)
    return [ConformanceCase("copy_pages", situation, check) for situation, check in cases.items()]


def _gather(
    *,
    slots: Callable[[], torch.Tensor] = SLOTS["shuffled"],
    form: str = "separate",
    layout: str = "NHD",
    num_pages: int = NUM_PAGES,
    page_size: int = PAGE_SIZE,
    heads: int = 2,
    dim: int = 8,
    value_dim: int = 5,
    dtype: torch.dtype = F32,
) -> dict[str, Any]:
    shape = {"num_pages": num_pages, "page_size": page_size, "num_kv_heads": heads}
    pages = kv_page_views(form, layout, **shape, head_dim=dim, value_dim=value_dim, dtype=dtype)
    for view in pages:
        view.copy_(bit_patterns(*view.shape, dtype=dtype))
    return {"key_pages": pages[0], "value_pages": pages[1], "slots": slots(), "layout": layout}


def _copy(
    pages: Callable[[Fill], tuple[torch.Tensor, ...]],
    src: Sequence[int] = (5, 0, 5),
    dst: Sequence[int] = (1, 3, 0),
    dtype: torch.dtype = F32,
) -> dict[str, Any]:
    src_pages, dst_pages = pages(partial(bit_patterns, dtype=dtype))
    return {"src_pages": src_pages, "dst_pages": dst_pages, **_ids(src, dst)}


def _copy_within(
    dtype: torch.dtype, src: Sequence[int] = (5, 0, 5), dst: Sequence[int] = (1, 3, 4), num_pages: int = NUM_PAGES
) -> dict[str, Any]:
    pages = bit_patterns(num_pages, 2, 3, 8, dtype=dtype)
    return {"src_pages": pages, "dst_pages": pages, **_ids(src, dst)}


def _copy_many(num_pages: int, num_copies: int) -> dict[str, Any]:
    """Pages of one tensor: those that are read and those that are written lie anywhere."""
    pages = bit_patterns(num_pages, 3)
    src, dst = torch.randperm(num_pages)[: 2 * num_copies].chunk(2)
    return {"src_pages": pages, "dst_pages": pages, "src": src, "dst": dst}


def _copy_shared() -> dict[str, Any]:
    """Page i of dst is page i + 2 of src: page 4 is read and written, so all must be read first."""
    pages = bit_patterns(8, 2, 3)
    return {"src_pages": pages, "dst_pages": pages[2:], **_ids((3, 4, 5), (2, 3, 0))}


def _ids(src: Sequence[int], dst: Sequence[int]) -> dict[str, torch.Tensor]:
    return {"src": torch.tensor(src, dtype=torch.int64), "dst": torch.tensor(dst, dtype=torch.int64)}
