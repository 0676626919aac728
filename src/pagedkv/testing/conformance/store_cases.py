"""store_kv: slots that are skipped, repeated, refused, many; sources and pages of all strides; codes and scales.

Tokens and pages hold any bits, so that what changes a bit shows, and so does a page that is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...kernels.store_kv import store_kv
from ...kernels.store_mla import store_mla
from ...shapes import dtype_name
from ..mla_batch import mla_page_views
from ..page_views import kv_page_views
from .bit_patterns import bit_patterns
from .case import ConformanceCase
from .judge import moves_as_reference, refuses

__all__ = ["store_cases"]

Pair = tuple[torch.Tensor, torch.Tensor]
Fill = Callable[..., torch.Tensor]
Source = Callable[[Fill, int, int, int, int], Pair]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
NUM_PAGES, PAGE_SIZE = 5, 4
NUM_SLOTS = NUM_PAGES * PAGE_SIZE
# More than 16 bits count, and than the blocks that a grid may have along an axis.
MANY = 70_001

SLOTS: dict[str, Callable[[], torch.Tensor]] = {
    "shuffled": lambda: torch.randperm(NUM_SLOTS)[:13],
    "all": lambda: torch.randperm(NUM_SLOTS),
    # Cut to 32 bits, the last two would be the slots 1 and 0.
    "negative": lambda: torch.tensor([7, -1, -NUM_SLOTS, 0, -2, 1 - 2**32, -(2**62)]),
    "all-negative": lambda: torch.full((3,), -1),
    "duplicates": lambda: torch.tensor([3, 9, 3, -1, 9, 9, 3, 0]),
    "many-duplicates": lambda: torch.randint(-2, NUM_SLOTS, (600,)),
    "one": lambda: torch.tensor([NUM_SLOTS - 1]),
    "empty": lambda: torch.zeros(0, dtype=torch.int64),
    "strided": lambda: torch.stack([torch.randperm(NUM_SLOTS), torch.full((NUM_SLOTS,), 2**40)], 1)[:, 0],
}


def _packed(fill: Fill, n: int, heads: int, dim: int, value_dim: int) -> Pair:
    """Of one projection that holds all queries, all keys and all values of a token."""
    _, key, value = torch.split_with_sizes(
        fill(n, heads * (2 * dim + value_dim)), [heads * dim, heads * dim, heads * value_dim], 1
    )
    return key.view(n, heads, dim), value.view(n, heads, value_dim)


def _packed_by_head(fill: Fill, n: int, heads: int, dim: int, value_dim: int) -> Pair:
    """A head's query, key and value side by side: the stride of a head is not its width."""
    _, key, value = torch.split_with_sizes(fill(n, heads, 2 * dim + value_dim), [dim, dim, value_dim], 2)
    return key, value


def _heads_first(fill: Fill, n: int, heads: int, dim: int, value_dim: int) -> Pair:
    return fill(heads, n, dim).transpose(0, 1), fill(heads, n, value_dim).transpose(0, 1)


def _expanded(fill: Fill, n: int, heads: int, dim: int, value_dim: int) -> Pair:
    return fill(n, 1, dim).expand(n, heads, dim), fill(1, heads, value_dim).expand(n, heads, value_dim)


SOURCES: dict[str, Source] = {
    "packed-qkv": _packed,
    "packed-by-head": _packed_by_head,
    "heads-first": _heads_first,
    "expanded": _expanded,
}


# Numbers of heads, widths of keys and values.
SHAPES = [(1, 576, 512), (8, 64, 64), (40, 128, 128), (2, 192, 128), (3, 256, 256), (1, 1, 1), (2, 80, 13)]
PAGE_SIZES = (1, 4, 32, 64, 256)

# What is quantised and to what, and the settings of `_quantising`.
CODES: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    **{f"{dtype_name(to)}-of-{dtype_name(of)}": (of, to, {}) for to in (I8, E4M3) for of in (F32, F16, BF16)},
    "int8-of-bfloat16-HND": (BF16, I8, {"layout": "HND", "form": "sliced"}),
    "float8_e4m3fn-of-float16-HND": (F16, E4M3, {"layout": "HND", "form": "sliced"}),
    "float8_e4m3fn-page-first": (F32, E4M3, {"form": "page_first"}),
    "int8-duplicates": (F32, I8, {"slots": SLOTS["many-duplicates"]}),
    "float8_e4m3fn-duplicates": (BF16, E4M3, {"slots": SLOTS["many-duplicates"]}),
    "int8-40-heads": (F16, I8, {"heads": 40, "dim": 128, "value_dim": 64}),
    "float8_e4m3fn-40-heads": (F16, E4M3, {"heads": 40, "dim": 128, "value_dim": 64}),
    "int8-576-512": (F32, I8, {"heads": 1, "dim": 576, "value_dim": 512}),
    "float8_e4m3fn-256": (BF16, E4M3, {"dim": 256, "value_dim": 192, "page_size": 32}),
    "float8_e4m3fn-many-tokens": (
        BF16,
        E4M3,
        {
            "slots": lambda: torch.randperm(MANY),
            "num_pages": MANY,
            "page_size": 1,
            "heads": 1,
            "dim": 2,
            "value_dim": 2,
        },
    ),
}


def store_cases() -> list[ConformanceCase]:
    """All cases of the op."""
    cases = {name: moves_as_reference(store_mla if "latent" in name else store_kv, m) for name, m in _makes().items()}
    for name, (of, to, settings) in CODES.items():
        cases[f"codes-{name}"] = moves_as_reference(store_kv, partial(_quantising, of, to, **settings))
    for name, slots in _bad_slots().items():
        culprit = str(int(slots.max()))
        cases[f"refuses-a-slot-{name}"] = refuses(store_kv, partial(_call, slots=slots.clone), culprit)
        cases[f"refuses-a-slot-{name}-of-codes"] = refuses(
            store_kv, partial(_quantising, F32, I8, slots=slots.clone), culprit
        )
    return [ConformanceCase("store_kv", situation, check) for situation, check in cases.items()]


def _makes() -> dict[str, Callable[[], dict[str, Any]]]:
    apart: dict[str, Any] = {"source": SOURCES["packed-by-head"], "value_dim": 5}
    return {
        **{f"slots-{name}": partial(_call, slots=slots) for name, slots in SLOTS.items()},
        **{f"slots-{name}-HND": partial(_call, slots=SLOTS[name], layout="HND") for name in ("negative", "duplicates")},
        **{dtype_name(dtype): partial(_call, dtype=dtype) for dtype in (F16, BF16, I8, E4M3, E5M2)},
        **{name: partial(_call, source=source, value_dim=5) for name, source in SOURCES.items()},
        **{
            f"{form}-{layout}": partial(_call, form=form, layout=layout, **apart)
            for form in ("separate", "interleaved", "page_first", "sliced")
            for layout in ("NHD", "HND")
        },
        **{
            f"heads-{heads}-widths-{dim}-{value_dim}-{dtype_name(dtype)}": partial(
                _call, heads=heads, dim=dim, value_dim=value_dim, dtype=dtype
            )
            for heads, dim, value_dim in SHAPES
            for dtype in (F32, F16, BF16)
        },
        **{
            f"page-size-{n}-{layout}": partial(
                _call, page_size=n, layout=layout, slots=partial(torch.randperm, NUM_PAGES * n)
            )
            for n in PAGE_SIZES
            for layout in ("NHD", "HND")
        },
        "many-tokens": partial(_call, slots=lambda: torch.randperm(MANY), num_pages=MANY // 4 + 1, heads=1),
        "many-pages": partial(_call, slots=lambda: MANY - 1 - torch.randperm(50), num_pages=MANY, page_size=1),
        "permuted-pages": _permuted,
        "latents-576-512": partial(_latents, 512, 64),
        "latents-alone": partial(_latents, 40, 0),
        "tokens-in-the-pages": _from_the_pages,
    }


def _bad_slots() -> dict[str, torch.Tensor]:
    late = torch.arange(-200, 0)
    late[-2] = NUM_SLOTS + 3
    return {
        "beyond": torch.tensor([0, -1, NUM_SLOTS, 3]),
        "far-beyond": torch.tensor([0, -1, 2**32, 3]),
        "beyond-near-the-end": late,
    }


def _call(
    *,
    slots: Callable[[], torch.Tensor] = SLOTS["shuffled"],
    source: Source = SOURCES["packed-qkv"],
    layout: str = "NHD",
    form: str = "separate",
    num_pages: int = NUM_PAGES,
    page_size: int = PAGE_SIZE,
    heads: int = 3,
    dim: int = 8,
    value_dim: int = 8,
    dtype: torch.dtype = F32,
) -> dict[str, Any]:
    shape = {"num_pages": num_pages, "page_size": page_size, "num_kv_heads": heads}
    key_pages, value_pages = kv_page_views(form, layout, **shape, head_dim=dim, value_dim=value_dim, dtype=dtype)
    for view in (key_pages, value_pages):
        view.copy_(bit_patterns(*view.shape, dtype=dtype))
    slot_mapping = slots()
    key, value = source(partial(bit_patterns, dtype=dtype), len(slot_mapping), heads, dim, value_dim)
    pages = {"key_pages": key_pages, "value_pages": value_pages}
    return {"key": key, "value": value, **pages, "slot_mapping": slot_mapping, "layout": layout}


def _permuted() -> dict[str, Any]:
    """Pages whose offsets lie further apart than pages, and heads further than both."""
    pages = (bit_patterns(3, PAGE_SIZE, NUM_PAGES, 8).permute(2, 1, 0, 3) for _ in range(2))
    return {**_call(), **dict(zip(("key_pages", "value_pages"), pages, strict=True))}


def _latents(latent_dim: int, rope_dim: int) -> dict[str, Any]:
    latent_pages, rope_pages = mla_page_views(
        "joined", num_pages=NUM_PAGES, page_size=PAGE_SIZE, latent_dim=latent_dim, rope_dim=rope_dim
    )
    slots = SLOTS["duplicates"]()
    latent, rope = torch.split_with_sizes(bit_patterns(len(slots), latent_dim + rope_dim), [latent_dim, rope_dim], 1)
    tokens = {"latent": latent, "rope": rope if rope_dim else None}
    pages = {"latent_pages": latent_pages, "rope_pages": rope_pages if rope_dim else None}
    return {**tokens, **pages, "slot_mapping": slots}


def _from_the_pages() -> dict[str, Any]:
    """Slot s takes what slot s - 1 held: written one by one as they are read, one token would fill the page."""
    call = _call()
    tokens = {"key": call["key_pages"][0, :3], "value": call["value_pages"][0, :3]}
    return {**call, **tokens, "slot_mapping": torch.tensor([1, 2, 3])}


def _quantising(
    of: torch.dtype, to: torch.dtype, *, slots: Callable[[], torch.Tensor] = SLOTS["negative"], **settings: Any
) -> dict[str, Any]:
    """With a row of zeros and one of NaN, and scales whose strides are not those of a fresh tensor."""
    call = _call(slots=slots, dtype=to, **{"heads": 2, "dim": 24, "value_dim": 7, **settings})
    key, value = (torch.randn(call[name].shape).to(of) for name in ("key", "value"))
    key[0], value[3, -1, 1] = 0, torch.nan
    num_pages, page_size = settings.get("num_pages", NUM_PAGES), settings.get("page_size", PAGE_SIZE)
    scales = torch.randn(2, num_pages, page_size, key.shape[1]).transpose(2, 3)
    return {**call, "key": key, "value": value, "key_scales": scales[0], "value_scales": scales[1]}
