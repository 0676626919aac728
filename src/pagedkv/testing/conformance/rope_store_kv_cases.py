"""rope_store_kv: what apply_rope and store_kv do, in one call.

The first heads of each query are the keys, so that the result tells how the back end turns a key; what is stored must
then be, bit for bit, what the reference makes of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...kernels.rope import RotaryEmbedding
from ...kernels.rope_store_kv import rope_store_kv
from ...kernels.store_kv import store_kv
from ...shapes import dtype_name
from ..numeric import rope_oracle
from ..page_views import kv_page_views
from .bit_patterns import bit_patterns
from .case import Check, ConformanceCase, threads_of_caller
from .judge import CPU, assert_rounded_once, assert_same, assert_same_memory, placed, refuses
from .number_cases import ROPES
from .store_cases import MANY, NUM_PAGES, NUM_SLOTS, PAGE_SIZE, SLOTS

__all__ = ["rope_store_kv_cases"]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3 = torch.int8, torch.float8_e4m3fn

# Numbers of query heads, of KV heads, widths of keys and values.
SHAPES = [(32, 8, 128, 128), (40, 40, 64, 64), (3, 1, 576, 512), (2, 2, 80, 13), (9, 3, 2, 1), (4, 2, 256, 192)]


def rope_store_kv_cases() -> list[ConformanceCase]:
    """All cases of the op."""
    checks = {name: _turns_and_stores(make) for name, make in _makes().items()}
    for name, slot in (("beyond", NUM_SLOTS), ("far-beyond", 2**32)):
        bad = partial(torch.tensor, [0, -1, slot, 3])
        checks[f"refuses-a-slot-{name}"] = refuses(rope_store_kv, partial(_with_out, slots=bad), str(slot))
        codes = partial(_with_out, slots=bad, pages=I8)
        checks[f"refuses-a-slot-{name}-of-codes"] = refuses(rope_store_kv, codes, str(slot))
    return [ConformanceCase("rope_store_kv", situation, check) for situation, check in checks.items()]


def _makes() -> dict[str, Callable[[], dict[str, Any]]]:
    many: dict[str, Any] = {
        "slots": lambda: torch.randperm(MANY),
        "num_pages": MANY,
        "page_size": 1,
        "heads": (1, 1),
        "widths": (2, 2),
        "rope": RotaryEmbedding(2),
    }
    return {
        **{name: partial(_call, rope=rope) for name, rope in ROPES.items()},
        **{f"slots-{name}": partial(_call, slots=slots) for name, slots in SLOTS.items()},
        **{dtype_name(dtype): partial(_call, dtype=dtype) for dtype in (F16, BF16)},
        "interleaved-bfloat16": partial(_call, dtype=BF16, rope=ROPES["interleaved"]),
        "queries-in-float32": partial(_call, dtype=BF16, query_dtype=F32),
        **{
            f"{form}-{layout}": partial(_call, form=form, layout=layout)
            for form in ("separate", "interleaved", "page_first", "sliced")
            for layout in ("NHD", "HND")
        },
        "heads-first": partial(_call, is_packed=False),
        **{
            f"heads-{query_heads}-{heads}-widths-{dim}-{value_dim}": partial(
                _call,
                heads=(query_heads, heads),
                widths=(dim, value_dim),
                rope=RotaryEmbedding(min(dim, 64)),
                dtype=F16,
            )
            for query_heads, heads, dim, value_dim in SHAPES
        },
        "many-tokens": partial(_call, **many),
        "far-positions": partial(_call, positions=lambda n: (-2) ** torch.arange(33, 33 + n)),
        "in-a-tensor-of-the-caller": _with_out,
        "tokens-in-the-pages": _from_the_pages,
        **{
            f"{dtype_name(pages)}-of-{dtype_name(dtype)}": partial(_call, dtype=dtype, pages=pages)
            for pages in (I8, E4M3)
            for dtype in (F32, F16, BF16)
        },
        "int8-HND": partial(_call, pages=I8, layout="HND", form="sliced", rope=ROPES["partial"]),
        "float8_e4m3fn-page-first": partial(_call, pages=E4M3, form="page_first", rope=ROPES["interleaved"]),
        "int8-duplicates": partial(_call, pages=I8, slots=SLOTS["many-duplicates"]),
        "int8-heads-32-8": partial(_call, pages=I8, dtype=BF16, heads=(32, 8), widths=(128, 128)),
        "int8-many-tokens": partial(_call, pages=I8, **many),
    }


def _call(
    *,
    rope: RotaryEmbedding = ROPES["half"],
    positions: Callable[[int], torch.Tensor] = lambda n: torch.randint(-5000, 150000, (n,)),
    slots: Callable[[], torch.Tensor] = SLOTS["duplicates"],
    dtype: torch.dtype = F32,
    query_dtype: torch.dtype | None = None,
    pages: torch.dtype | None = None,
    is_packed: bool = True,
    layout: str = "NHD",
    form: str = "separate",
    num_pages: int = NUM_PAGES,
    page_size: int = PAGE_SIZE,
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (72, 24),
) -> dict[str, Any]:
    """`heads` of queries and of keys, `widths` of keys and of values; `pages`: the dtype of codes."""
    (query_heads, kv_heads), (dim, value_dim) = heads, widths
    views = kv_page_views(
        form,
        layout,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=kv_heads,
        head_dim=dim,
        value_dim=value_dim,
        dtype=pages or dtype,
    )
    for view in views:
        view.copy_(bit_patterns(*view.shape, dtype=view.dtype))
    slot_mapping = slots()
    num_tokens = len(slot_mapping)
    parts = [(query_heads, dim), (kv_heads, dim), (kv_heads, value_dim)]
    if is_packed:
        packed = torch.randn(num_tokens, sum(n * width for n, width in parts)).to(dtype)
        columns = packed.split_with_sizes([n * width for n, width in parts], 1)
        query, key, value = (part.view(num_tokens, *shape) for part, shape in zip(columns, parts, strict=True))
    else:
        query, key, value = (torch.randn(n, num_tokens, width).to(dtype).transpose(0, 1) for n, width in parts)
    if pages is None:
        value.copy_(bit_patterns(*value.shape, dtype=dtype))
    elif num_tokens > 3:
        key[0], value[3, -1, 1] = 0, torch.nan
    query[:, :kv_heads] = key
    call: dict[str, Any] = {
        "query": query.to(query_dtype or dtype),
        "key": key,
        "value": value,
        "positions": positions(num_tokens),
        "rope": rope,
        "key_pages": views[0],
        "value_pages": views[1],
        "slot_mapping": slot_mapping,
        "layout": layout,
    }
    if pages is not None:
        scales = torch.randn(2, num_pages, page_size, kv_heads).transpose(2, 3)
        call |= {"key_scales": scales[0], "value_scales": scales[1]}
    return call


def _with_out(**settings: Any) -> dict[str, Any]:
    call = _call(**settings)
    return {**call, "out": torch.empty(call["query"].shape)}


def _from_the_pages() -> dict[str, Any]:
    """Slot s takes what slot s - 1 held: written one by one as they are read, one token would fill the page."""
    call = _call(slots=lambda: torch.tensor([1, 2, 3]), widths=(64, 64))
    for pages in (call["key_pages"], call["value_pages"]):
        pages.normal_()
    key, value = call["key_pages"][0, :3], call["value_pages"][0, :3]
    call["query"][:, : key.shape[1]] = key
    return {**call, "key": key, "value": value}


def _turns_and_stores(make: Callable[[], dict[str, Any]]) -> Check:
    def check(backend: str, device: torch.device) -> None:
        call = make()
        expected, there = placed(call, CPU), placed(call, device)
        with threads_of_caller():
            rotated = rope_store_kv(**there, backend=backend).cpu()
        query, rope = call["query"], call["rope"]
        assert rotated.dtype == query.dtype, f"the result must have dtype {query.dtype}, got {rotated.dtype}."
        of = query, call["positions"], rope
        assert_rounded_once("query", rotated, rope_oracle(*of), rope_oracle(*of, torch.float32))
        assert_same("columns beyond rope.dim", rotated[..., rope.dim :], query[..., rope.dim :])
        stored = {name: part for name, part in expected.items() if name not in ("query", "positions", "rope", "out")}
        turned_key = rotated[:, : call["key"].shape[1]].to(call["key"].dtype)
        store_kv(**{**stored, "key": turned_key}, backend="reference")
        if "out" in expected:
            expected["out"].copy_(rotated)
        assert_same_memory(there, expected)

    return check
