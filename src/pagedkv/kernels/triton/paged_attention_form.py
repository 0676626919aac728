"""What the attention kernel is specialised for: how each dtype is computed, and how large the tiles of a target are."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..attention_options import AttentionOptions
from ..attention_plan import AttentionPlan
from ..exp_table import ExpTable
from .attention_work import tile_heights
from .paged_attention_kernel import attend_tile
from .runtime import has_e4m3
from .variant import Variant

__all__ = ["Call", "Form", "Launch", "compile_variants", "form_of"]

_TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
_TILE_NAMES = ("few", "some", "many")
_KINDS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "integer"}
_EIGHT_BITS = tuple(_KINDS)
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
# Beyond these a scale is multiplied into logits first, so that a product of it with a power of two stays a number.
_PLAIN_SCALES = 1e-3, 1e30


class Call(NamedTuple):
    """What of a call decides how the kernel is specialised: equal for the layers of a model and most of its steps.

    is_natural: as of `Form`. rope_dim: 0 for no rotation. table_steps, steps_per_unit: of the table of exponentials,
    0 without one.
    """

    query_dtype: torch.dtype
    page_dtype: torch.dtype
    out_dtype: torch.dtype
    head_dim: int
    value_dim: int
    group: int
    page_size: int
    causal: bool
    has_window: bool
    has_mask: bool
    has_cap: bool
    has_value_scales: bool
    is_natural: bool
    rope_dim: int
    is_interleaved: bool
    table_steps: int
    steps_per_unit: float

    @classmethod
    def of(
        cls,
        query_dtype: torch.dtype,
        page_dtype: torch.dtype,
        out_dtype: torch.dtype,
        plan: AttentionPlan,
        options: AttentionOptions,
    ) -> Call:
        """That of a plan and options, whose tensors are present or not."""
        low, high = _PLAIN_SCALES
        has_cap = options.soft_cap > 0
        table = options.exp_table
        has_rule = has_cap or options.alibi_slopes is not None or table is not None
        return cls(
            query_dtype=query_dtype,
            page_dtype=page_dtype,
            out_dtype=out_dtype,
            head_dim=plan.head_dim,
            value_dim=plan.value_dim,
            group=plan.group,
            page_size=plan.page_size,
            causal=plan.causal,
            has_window=plan.window_left >= 0,
            has_mask=plan.custom_mask is not None,
            has_cap=has_cap,
            has_value_scales=options.value_scales is not None,
            is_natural=has_rule or not low <= options.sm_scale <= high,
            rope_dim=0 if options.rope_table is None else 2 * options.rope_table.shape[1],
            is_interleaved=options.rope_interleaved,
            table_steps=0 if table is None else table.num_steps,
            steps_per_unit=0.0 if table is None else table.num_steps / table.max_distance,
        )


class Form(NamedTuple):
    """What the kernel is specialised for.

    head_dim, value_dim, group, page_size, causal, has_window: of the plan. page_kind: "number", or "e4m3" and "e5m2" of
    pages that are passed as uint8. has_e4m3: the target converts float8_e4m3fn itself.
    query_as: "same", the dtype of the keys; "float16", rows that were scaled, against codes of 8 bits; "float32",
    anything else, and the only way that turns rows. For the first two q stays in registers, its columns as block_d and
    rest_d; for the last, block_d columns of q and keys are loaded at a time.
    value_dtype, num_parts, weight_scale: of the product of weights and values; weights are the sum of so many numbers.
    is_natural: logits are scaled before anything else; otherwise the maximum is that of q.k, and sm_scale is positive.
    rope_dim, table_steps, steps_per_unit: as of `Call`.
    heads_outer: tiles side by side are of one head, not of one item.
    height: rows of an item; block_m of them are one program's. block_n: keys of a block that all its rows see, edge_n:
    of others; a page of a multiple of these is read as one piece. edge_stages: of the loop over the others.
    """

    head_dim: int
    value_dim: int
    group: int
    page_size: int
    causal: bool
    has_window: bool
    page_kind: str
    has_e4m3: bool
    query_as: str
    value_dtype: Any
    num_parts: int
    weight_scale: float
    has_cap: bool
    is_natural: bool
    rope_dim: int
    is_interleaved: bool
    table_steps: int
    steps_per_unit: float
    heads_outer: bool
    height: int
    block_m: int
    block_n: int
    edge_n: int
    block_d: int
    rest_d: int
    block_v: int
    edge_stages: int


class Launch(NamedTuple):
    """How a program of the kernel is compiled: warps, and blocks of keys on their way at a time."""

    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=1024)
def form_of(kind: int, target: str, call: Call) -> tuple[Form, Launch]:
    """What the kernel of items of a kind (0 few, 1 some, 2 many rows) is specialised for on a target ("cuda:90")."""
    query_as = _query_as(call)
    value_dtype, num_parts = _value_dtype(call)
    tile, launch = _tile(kind, target, call, query_as, value_dtype, num_parts)
    form = Form(
        head_dim=call.head_dim,
        value_dim=call.value_dim,
        group=call.group,
        page_size=call.page_size,
        causal=call.causal,
        has_window=call.has_window,
        page_kind=_KINDS.get(call.page_dtype, "number"),
        has_e4m3=has_e4m3(target),
        query_as=query_as,
        value_dtype=value_dtype,
        num_parts=num_parts,
        weight_scale=16384.0 if num_parts > 1 and value_dtype == tl.float16 else 1.0,
        has_cap=call.has_cap,
        is_natural=call.is_natural,
        rope_dim=call.rope_dim,
        is_interleaved=call.is_interleaved,
        table_steps=call.table_steps,
        steps_per_unit=call.steps_per_unit,
        heads_outer=kind == 2,
        **tile,
    )
    return form, launch


def _query_as(call: Call) -> str:
    """How q.k is computed without rounding q or k; see `Form`."""
    if not call.rope_dim and call.query_dtype in _SIXTEEN_BITS:
        if call.query_dtype == call.page_dtype:
            return "same"
        if call.page_dtype in _EIGHT_BITS:
            return "float16"
    return "float32"


def _value_dtype(call: Call) -> tuple[Any, int]:
    """The dtype, exact for values, of the product of weights and values; and the parts a weight needs to keep as many
    bits as the result has."""
    if call.page_dtype == torch.float32:
        return tl.float32, 1
    # Weights times the scales of tokens may be of any size.
    if call.page_dtype == torch.bfloat16 or (call.page_dtype in _EIGHT_BITS and call.has_value_scales):
        return tl.bfloat16, {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[call.out_dtype]
    return tl.float16, 2 if call.out_dtype == torch.float32 else 1


def _tile(
    kind: int, target: str, call: Call, query_as: str, value_dtype: Any, num_parts: int
) -> tuple[dict[str, int], Launch]:
    """Sizes of blocks: as large as registers and shared memory of the target hold."""
    widest = max(call.head_dim, call.value_dim)
    height = tile_heights(widest)[kind]
    block_v = max(triton.next_power_of_2(call.value_dim), 16)
    is_float32 = query_as == "float32" or value_dtype == tl.float32
    if query_as == "float32":
        most = 32 if call.rope_dim or call.table_steps or widest > 256 else 64
        block_d, rest_d = min(max(triton.next_power_of_2(call.head_dim), 16), most), 0
    else:
        block_d, rest_d = _split(call.head_dim)
    # 227 KiB of shared memory a block, and registers to match; interpreted kernels are cut as for the first of them.
    has_much_memory = target in ("cuda:90", "cuda:100", "cuda:103", "interpreted")
    # Conversions of codes and parts of weights take registers.
    is_tight = call.page_dtype.itemsize == 1 or num_parts > 1
    edge_n = 16
    if is_float32 or widest > 256:
        block_m = min(height, 32 if widest <= 128 else 16)
        block_n, num_warps, num_stages = 32 if widest <= 256 else 16, 8, 1
        edge_n = 32 if widest <= 128 else 16
        if value_dtype != tl.float32 and widest <= 128 and not call.rope_dim:
            block_m, num_warps = 16, 4  # with twice as many of both ptxas keeps to 80 registers and spills
    elif kind == 0:
        block_m, num_warps = height, 4
        block_n, num_stages = 64 if widest <= 128 else 32, 4 if call.page_dtype.itemsize == 1 else 3
        edge_n = 32 if widest <= 128 else 16
    elif widest > 128:
        block_m, block_n, num_warps, num_stages = height, 32, 8, 2
        if is_tight:
            block_m, num_warps = 32, 4
    else:
        block_m, block_n, num_warps, num_stages = height, 64, 4 if kind == 1 else 8, 3 if has_much_memory else 2
        edge_n = 32 if widest <= 64 else 16
        if target == "cuda:80" and (call.page_size % block_n or not call.causal):
            block_m, block_n = 64, 32  # a page for each key takes registers
        if is_tight:
            block_n = 32
            if not has_much_memory:
                block_m, num_warps = 64, 8
    if target.startswith("hip"):
        num_stages = min(num_stages, 2)
        if kind > 0 and call.has_cap:
            block_n = min(block_n, 32)
        if call.page_dtype.itemsize == 1:
            block_m = min(block_m, 32)
            num_warps = min(num_warps, 4)
    edge_n, edge_stages = min(edge_n, block_n), 1
    if call.has_mask:  # all blocks have masks
        if kind > 0 and not is_float32:
            block_m, block_n, edge_n, num_warps = min(block_m, 64 if has_much_memory else 32), 32, 32, 8
        block_n, edge_stages = edge_n, num_stages
    if call.table_steps:
        # Each weight takes three loads, whose addresses take registers and follow from a product: none can be early.
        block_m, block_n, num_stages, edge_stages = 16, min(block_n, 32), 1, 1
        num_warps = 4 if widest <= 128 else 8
        edge_n = min(edge_n, block_n)
    tile = {
        "height": height,
        "block_m": block_m,
        "block_n": block_n,
        "edge_n": edge_n,
        "block_d": block_d,
        "rest_d": rest_d,
        "block_v": block_v,
        "edge_stages": edge_stages,
    }
    return tile, Launch(num_warps, num_stages)


def _split(head_dim: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that hold so many columns with little to spare."""
    if head_dim <= 16:
        return 16, 0
    block = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - block
    return block, max(triton.next_power_of_2(rest), 16) if rest else 0


_NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*u8",
    torch.float8_e5m2: "*u8",
}
_STRIDES = (
    *("query_token", "query_head"),
    *("key_page", "key_token", "key_head"),
    *("value_page", "value_token", "value_head"),
)
_SCALE_STRIDES = (
    *("key_scale_page", "key_scale_token", "key_scale_head"),
    *("value_scale_page", "value_scale_token", "value_scale_head"),
)


def compile_variants() -> list[Variant]:
    """Every dtype and every option, on the tiles of each target."""
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    e4m3, e5m2, int8 = _EIGHT_BITS
    table = torch.empty(1)
    scaled = {"key_scales": table, "value_scales": table}
    wide, small = {"head_dim": 256, "value_dim": 256}, {"head_dim": 64, "value_dim": 64}
    # Name: kinds of tiles, dtypes of query, pages and out, plan, options.
    cases: dict[str, tuple[str, tuple[torch.dtype, ...], dict[str, Any], dict[str, Any]]] = {
        "bf16": ("012", (bf16, bf16, bf16), {}, {}),
        "f16-small-pages": ("02", (f16, f16, f16), {"page_size": 16}, {}),
        "f32": ("0", (f32, f32, f32), {}, {}),
        "int8-scales": ("02", (bf16, int8, bf16), {}, scaled),
        "e4m3": ("02", (bf16, e4m3, bf16), {}, {}),
        "e4m3-scales-f16": ("0", (f16, e4m3, f16), {}, scaled),
        "e5m2": ("0", (bf16, e5m2, bf16), {}, {}),
        "64": ("02", (bf16, bf16, bf16), small, {}),
        "256": ("02", (bf16, bf16, bf16), wide, {}),
        "192-128": ("2", (bf16, bf16, bf16), {"head_dim": 192}, {}),
        "80": ("0", (f16, f16, f16), {"head_dim": 80, "value_dim": 80, "page_size": 3}, {}),
        "out-f32": ("02", (bf16, bf16, f32), {}, {}),
        "out-f32-256": ("2", (f16, f16, f32), wide, {}),
        "window-cap": ("2", (bf16, bf16, bf16), {"window_left": 100}, {"soft_cap": 30.0}),
        "mask-alibi": ("0", (bf16, bf16, bf16), {"custom_mask": table}, {"alibi_slopes": table, "sinks": table}),
        "rope": ("0", (bf16, bf16, bf16), {}, {"rope_table": torch.empty(1, 64, 2)}),
        "f32-of-bf16": ("02", (f32, bf16, f32), {}, {}),
        "f32-of-int8-scales": ("02", (f32, int8, f32), {}, scaled),
        "f32-of-bf16-512": ("0", (f32, bf16, f32), {"head_dim": 576, "value_dim": 512}, {}),
        "exp-table": ("02", (bf16, bf16, bf16), {}, {"exp_table": ExpTable()}),
        "exp-table-f32-of-e4m3": ("0", (f32, e4m3, f32), {}, {**scaled, "exp_table": ExpTable()}),
    }
    return [
        _variant(f"attention-{name}-{_TILE_NAMES[int(kind)]}-{target}", int(kind), target, dtypes, plan, options)
        for name, (kinds, dtypes, plan, options) in cases.items()
        for kind in kinds
        for target in _TARGETS
    ]


def _variant(
    name: str,
    kind: int,
    target: str,
    dtypes: tuple[torch.dtype, ...],
    of_plan: dict[str, Any],
    of_options: dict[str, Any],
) -> Variant:
    none = torch.empty(0, dtype=torch.int32)
    arrays = dict.fromkeys(("query_indptr", "page_indptr", "page_indices", "seq_lens"), none)
    heads = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "value_dim": 128}
    counts = {"num_tokens": 0, "max_page": -1, "num_positions": 1}
    rules = {"page_size": 64, "causal": True, "window_left": -1}
    plan = AttentionPlan(**{**arrays, **heads, **counts, **rules, **of_plan})
    options = AttentionOptions(sm_scale=0.125, **of_options)
    form, launch = form_of(kind, target, Call.of(dtypes[0], dtypes[1], dtypes[2], plan, options))
    integers = ("Items", "QueryIndptr", "PageIndptr", "PageIds", "SeqLens")
    floats = {"Sinks": options.sinks, "Slopes": options.alibi_slopes, "RopeTable": options.rope_table}
    floats |= {"KeyScales": options.key_scales, "ValueScales": options.value_scales}
    entries, powers = (None, None) if options.exp_table is None else options.exp_table.tensors()
    floats |= {"ExpEntries": entries, "ExpPowers": powers}
    pointers = dict(zip(("Query", "Keys", "Values", "Out"), (_NAMES[dtypes[i]] for i in (0, 1, 1, 2)), strict=True))
    pointers |= dict.fromkeys(integers, "*i32") | dict.fromkeys(("Lse", "Sums", "Stats"), "*fp32")
    pointers |= {name: "*fp32" for name, given in floats.items() if given is not None}
    if plan.custom_mask is not None:
        pointers |= {"Mask": "*i1", "MaskIndptr": "*i64"}
    numbers = dict.fromkeys(("sm_scale", "soft_cap", "value_scale"), "fp32")
    numbers |= dict.fromkeys(
        ("num_items", "num_tokens", "num_kv_heads", "window_left", *_STRIDES, *_SCALE_STRIDES), "i32"
    )
    absent = dict.fromkeys(set(attend_tile.arg_names) - {*pointers, *numbers, "FORM"})
    return Variant(
        name,
        attend_tile,
        {**pointers, **numbers},
        {**absent, "FORM": form},
        frozenset({*pointers, *_STRIDES}),
        launch.num_warps,
        launch.num_stages,
        {other: "its tiles have other sizes" for other in _TARGETS if other != target},
    )
