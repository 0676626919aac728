"""gather_kv and copy_pages: moves out of slots and of whole pages, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...kernels.copy_pages import copy_pages
from ...kernels.gather_kv import gather_kv
from ...shapes import dtype_name
from ..page_views import PAGE_FORMS, kv_page_views
from .case import ConformanceCase
from .judge import moves_as_reference, refuses

__all__ = ["page_cases"]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
NUM_PAGES, PAGE_SIZE = 6, 3
NUM_SLOTS = NUM_PAGES * PAGE_SIZE

SLOTS = {
    "shuffled": torch.tensor([17, 0, 5, 9, 8]),
    "repeated": torch.tensor([4, 4, 16, 4]),
    "negative": torch.tensor([-1, 3, -(2**62), 1 - 2**32, 17]),
    "empty": torch.zeros(0, dtype=torch.int64),
}

COPIED = {
    "between-two": lambda: (_random(NUM_PAGES, 2, 3, 8), _random(4, 2, 3, 8)),
    "permuted": lambda: (_random(2, NUM_PAGES, 8, 3).permute(1, 0, 3, 2), _random(NUM_PAGES, 2, 3, 8)),
    "page-axis-inside": lambda: (_random(NUM_PAGES, 2, 3, 8), _random(2, 3, NUM_PAGES, 8).permute(2, 0, 1, 3)),
    "gaps": lambda: (_random(NUM_PAGES, 4, 3, 9)[:, 1:3, :, :8], _random(NUM_PAGES + 1, 2, 5, 16)[1:, :, :3, ::2]),
    "interleaved": lambda: _random(NUM_PAGES, 2, 3, 8).unbind(1),
    "one-element-a-page": lambda: (_random(NUM_PAGES), _random(NUM_PAGES)),
}


def page_cases() -> list[ConformanceCase]:
    """All cases of the two ops."""
    gathers: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"slots-{name}": partial(_gather, slots=slots) for name, slots in SLOTS.items()},
        **{f"{form}-HND": partial(_gather, form=form, layout="HND") for form in PAGE_FORMS},
        "sliced-NHD": partial(_gather, form="sliced"),
        **{dtype_name(dtype): partial(_gather, dtype=dtype) for dtype in (F16, BF16, I8, E4M3, E5M2)},
        "widths-576-512": partial(_gather, dim=576, value_dim=512, heads=1),
    }
    cases = [ConformanceCase("gather_kv", name, moves_as_reference(gather_kv, make)) for name, make in gathers.items()]
    for name, slot in (("beyond", NUM_SLOTS), ("far-beyond", 2**32)):
        make = partial(_gather, slots=torch.tensor([0, slot, -1]))
        cases.append(ConformanceCase("gather_kv", f"refuses-a-slot-{name}", refuses(gather_kv, make, str(slot))))
    return cases + _copy_cases()


def _copy_cases() -> list[ConformanceCase]:
    makes: dict[str, Callable[[], dict[str, Any]]] = {
        **{name: partial(_copy, pages) for name, pages in COPIED.items()},
        **{f"within-one-{dtype_name(dtype)}": partial(_copy_within, dtype) for dtype in (F32, F16, BF16, I8, E4M3)},
        "shared-bytes": _copy_shared,
        "empty": partial(_copy, COPIED["between-two"], [], []),
    }
    cases = {name: moves_as_reference(copy_pages, make) for name, make in makes.items()}
    refused: dict[str, tuple[list[int], list[int], str]] = {
        "a-source-beyond": ([0, NUM_PAGES], [1, 2], str(NUM_PAGES)),
        "a-negative-source": ([0, -1], [1, 2], "-1"),
        "a-target-beyond": ([0, 1], [2, 2**32], str(2**32)),
        "a-negative-target": ([0, 1], [-2, 3], "-2"),
        "a-target-twice": ([0, 1], [3, 3], "3"),
        "a-target-that-is-read": ([0, 1], [2, 0], "0"),
    }
    for name, (src, dst, culprit) in refused.items():
        cases[f"refuses-{name}"] = refuses(copy_pages, partial(_copy_within, F32, src, dst), culprit)
    return [ConformanceCase("copy_pages", situation, check) for situation, check in cases.items()]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _gather(
    *,
    slots: torch.Tensor = SLOTS["shuffled"],
    form: str = "separate",
    layout: str = "NHD",
    heads: int = 2,
    dim: int = 8,
    value_dim: int = 5,
    dtype: torch.dtype = F32,
) -> dict[str, Any]:
    shape = {"num_pages": NUM_PAGES, "page_size": PAGE_SIZE, "num_kv_heads": heads}
    pages = kv_page_views(form, layout, **shape, head_dim=dim, value_dim=value_dim, dtype=dtype)
    for view in pages:
        view.copy_(torch.randn(view.shape) * 40)
    # A NaN with a payload: a move keeps its bits.
    pages[0].view(torch.uint8)[-1, 0, 0, -1:] = 0x7F
    return {"key_pages": pages[0], "value_pages": pages[1], "slots": slots, "layout": layout}


def _copy(
    pages: Callable[[], tuple[torch.Tensor, ...]], src: tuple[int, ...] | list[int] = (5, 0, 5), dst: Any = (1, 3, 0)
) -> dict[str, Any]:
    src_pages, dst_pages = pages()
    return {"src_pages": src_pages, "dst_pages": dst_pages, **_ids(src, dst)}


def _copy_within(dtype: torch.dtype, src: Any = (5, 0, 5), dst: Any = (1, 3, 4)) -> dict[str, Any]:
    pages = (torch.randn(NUM_PAGES, 2, 3, 8) * 40).to(dtype)
    return {"src_pages": pages, "dst_pages": pages, **_ids(src, dst)}


def _copy_shared() -> dict[str, Any]:
    """Page i of dst is page i + 2 of src: page 4 is read and written, so all must be read first."""
    pages = torch.randn(8, 2, 3)
    return {"src_pages": pages, "dst_pages": pages[2:], **_ids((3, 4, 5), (2, 3, 0))}


def _ids(src: Any, dst: Any) -> dict[str, torch.Tensor]:
    return {"src": torch.tensor(src, dtype=torch.int64), "dst": torch.tensor(dst, dtype=torch.int64)}
