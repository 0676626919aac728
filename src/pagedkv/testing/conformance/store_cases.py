"""store_kv: slots that are skipped, repeated, refused; sources and pages of all strides; codes and scales."""

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
from .case import ConformanceCase
from .judge import moves_as_reference, refuses

__all__ = ["store_cases"]

Pair = tuple[torch.Tensor, torch.Tensor]
Source = Callable[[int, int, int, int], Pair]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
NUM_PAGES, PAGE_SIZE = 5, 4
NUM_SLOTS = NUM_PAGES * PAGE_SIZE

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


def _packed(n: int, heads: int, dim: int, value_dim: int) -> Pair:
    """Of one projection that holds all queries, all keys and all values of a token."""
    _, key, value = torch.split_with_sizes(
        torch.randn(n, heads * (2 * dim + value_dim)), [heads * dim, heads * dim, heads * value_dim], 1
    )
    return key.view(n, heads, dim), value.view(n, heads, value_dim)


def _packed_by_head(n: int, heads: int, dim: int, value_dim: int) -> Pair:
    """A head's query, key and value side by side: the stride of a head is not its width."""
    _, key, value = torch.split_with_sizes(torch.randn(n, heads, 2 * dim + value_dim), [dim, dim, value_dim], 2)
    return key, value


def _heads_first(n: int, heads: int, dim: int, value_dim: int) -> Pair:
    return torch.randn(heads, n, dim).transpose(0, 1), torch.randn(heads, n, value_dim).transpose(0, 1)


def _expanded(n: int, heads: int, dim: int, value_dim: int) -> Pair:
    return torch.randn(n, 1, dim).expand(n, heads, dim), torch.randn(1, heads, value_dim).expand(n, heads, value_dim)


SOURCES: dict[str, Source] = {
    "packed-qkv": _packed,
    "packed-by-head": _packed_by_head,
    "heads-first": _heads_first,
    "expanded": _expanded,
}


def store_cases() -> list[ConformanceCase]:
    """All cases of the op."""
    makes: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"slots-{name}": partial(_call, slots=slots) for name, slots in SLOTS.items()},
        **{f"slots-{name}-HND": partial(_call, slots=SLOTS[name], layout="HND") for name in ("negative", "duplicates")},
        **{dtype_name(dtype): partial(_call, dtype=dtype) for dtype in (F16, BF16, I8, E4M3, E5M2)},
        **{name: partial(_call, source=source, value_dim=5) for name, source in SOURCES.items()},
        **{
            f"{form}-{layout}": partial(_call, form=form, layout=layout, source=SOURCES["packed-by-head"], value_dim=5)
            for form in ("separate", "interleaved", "page_first", "sliced")
            for layout in ("NHD", "HND")
        },
        "permuted-pages": _permuted,
        "widths-576-512": partial(_call, dim=576, value_dim=512, heads=1),
        "latents-576-512": partial(_latents, 512, 64),
        "latents-alone": partial(_latents, 40, 0),
        "tokens-in-the-pages": _from_the_pages,
        "codes-int8": partial(_quantising, F32, I8),
        "codes-int8-of-float16": partial(_quantising, F16, I8),
        "codes-int8-of-bfloat16-HND": partial(_quantising, BF16, I8, layout="HND", form="sliced"),
        "codes-float8_e4m3fn": partial(_quantising, F32, E4M3, form="page_first"),
        "codes-duplicates": partial(_quantising, F32, I8, slots=SLOTS["many-duplicates"]),
    }
    cases = {name: moves_as_reference(store_mla if "latent" in name else store_kv, m) for name, m in makes.items()}
    for name, slot in (("beyond", NUM_SLOTS), ("far-beyond", 2**32)):
        bad = torch.tensor([0, -1, slot, 3])
        cases[f"refuses-a-slot-{name}"] = refuses(store_kv, partial(_call, slots=bad.clone), str(slot))
        cases[f"refuses-a-slot-{name}-of-codes"] = refuses(
            store_kv, partial(_quantising, F32, I8, slots=bad.clone), str(slot)
        )
    return [ConformanceCase("store_kv", situation, check) for situation, check in cases.items()]


def _call(
    *,
    slots: Callable[[], torch.Tensor] = SLOTS["shuffled"],
    source: Source = SOURCES["packed-qkv"],
    layout: str = "NHD",
    form: str = "separate",
    heads: int = 3,
    dim: int = 8,
    value_dim: int = 8,
    dtype: torch.dtype = F32,
) -> dict[str, Any]:
    shape = {"num_pages": NUM_PAGES, "page_size": PAGE_SIZE, "num_kv_heads": heads}
    key_pages, value_pages = kv_page_views(form, layout, **shape, head_dim=dim, value_dim=value_dim, dtype=dtype)
    slot_mapping = slots()
    key, value = (t if dtype == F32 else t.mul(40).to(dtype) for t in source(len(slot_mapping), heads, dim, value_dim))
    pages = {"key_pages": key_pages, "value_pages": value_pages}
    return {"key": key, "value": value, **pages, "slot_mapping": slot_mapping, "layout": layout}


def _permuted() -> dict[str, Any]:
    """Pages whose offsets lie further apart than pages, and heads further than both."""
    pages = (torch.empty(3, PAGE_SIZE, NUM_PAGES, 8).permute(2, 1, 0, 3) for _ in range(2))
    return {**_call(), **dict(zip(("key_pages", "value_pages"), pages, strict=True))}


def _latents(latent_dim: int, rope_dim: int) -> dict[str, Any]:
    latent_pages, rope_pages = mla_page_views(
        "joined", num_pages=NUM_PAGES, page_size=PAGE_SIZE, latent_dim=latent_dim, rope_dim=rope_dim
    )
    slots = SLOTS["duplicates"]()
    latent, rope = torch.split_with_sizes(torch.randn(len(slots), latent_dim + rope_dim), [latent_dim, rope_dim], 1)
    tokens = {"latent": latent, "rope": rope if rope_dim else None}
    pages = {"latent_pages": latent_pages, "rope_pages": rope_pages if rope_dim else None}
    return {**tokens, **pages, "slot_mapping": slots}


def _from_the_pages() -> dict[str, Any]:
    """Slot s takes what slot s - 1 held: written one by one as they are read, one token would fill the page."""
    call = _call()
    for name in ("key_pages", "value_pages"):
        call[name].copy_(torch.randn(call[name].shape))
    tokens = {"key": call["key_pages"][0, :3], "value": call["value_pages"][0, :3]}
    return {**call, **tokens, "slot_mapping": torch.tensor([1, 2, 3])}


def _quantising(
    of: torch.dtype, to: torch.dtype, slots: Callable[[], torch.Tensor] = SLOTS["negative"], **settings: Any
) -> dict[str, Any]:
    """With a row of zeros and one of NaN, and scales whose strides are not those of a fresh tensor."""
    call = _call(slots=slots, dtype=to, heads=2, dim=24, value_dim=7, **settings)
    num_tokens = len(call["slot_mapping"])
    key, value = torch.randn(num_tokens, 2, 24).to(of), torch.randn(num_tokens, 2, 7).to(of)
    key[0], value[3, 1, 2] = 0, torch.nan
    scales = torch.empty(2, NUM_PAGES, PAGE_SIZE, 2).transpose(2, 3)
    return {**call, "key": key, "value": value, "key_scales": scales[0], "value_scales": scales[1]}
