"""Attention of new tokens over keys and values in pages: decode, append, prefill and mixed batches in one op."""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..shapes import Shapes, check_device, check_dtype, check_floating, check_last_dim_contiguous
from .attention_plan import AttentionPlan
from .backend import OpCall, select
from .merge_states import AttentionState
from .pages import check_kv_pages, check_no_grad, to_nhd

__all__ = ["AttentionOptions", "paged_attention"]


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """What a back end computes besides the plan; `sinks` and `alibi_slopes` are float32 [Hq] or None."""

    sm_scale: float
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None


def paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    *,
    layout: str = "NHD",
    sm_scale: float | None = None,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | AttentionState:
    """Attention of each sequence's last q_len tokens over all its keys, read through the page table.

    Shapes: query [T, Hq, D]; key_pages [N, P, Hk, D]; value_pages [N, P, Hk, Dv] ("HND": [N, Hk, P, D]);
            out [T, Hq, Dv] in the dtype of query; with return_lse AttentionState(out, lse), lse [T, Hq] float32,
            natural logarithm.
    Rule:   row i of a sequence stands at position kv_len - q_len + i; query head h reads KV head h // (Hq / Hk);
            logit = sm_scale * q.k (sm_scale defaults to 1 / sqrt(D)); soft_cap c > 0: c * tanh(logit / c);
            alibi_slopes [Hq] float32 add slope * (key position - row position); then mask, window and softmax;
            sinks [Hq] float32 are logits that join the denominator alone.
            A row that sees no key gives exactly 0 and -inf. Accumulation is float32.
    When:   after the keys and values of the new tokens are stored.
    Owns:   writes `out` alone, which must not overlap the inputs. Slots beyond a sequence's length are never used.
    Raises: ValueError, TypeError for what breaks the lines above and for a tensor that requires a gradient while
            gradients are recorded; BackendUnavailableError for an explicit back end that cannot run it.
    Source: PagedAttention (arXiv 2309.06180); online softmax (arXiv 1805.02867).
            Reference: kernels/reference/paged_attention.py.
    """
    check_no_grad(
        query=query, key_pages=key_pages, value_pages=value_pages, sinks=sinks, alibi_slopes=alibi_slopes, out=out
    )
    if torch.compiler.is_compiling():
        return _traced(
            query,
            key_pages,
            value_pages,
            plan,
            layout,
            sm_scale,
            soft_cap,
            sinks,
            alibi_slopes,
            return_lse,
            out,
            backend,
        )
    state = _paged_attention(
        query, key_pages, value_pages, plan, layout, sm_scale, soft_cap, sinks, alibi_slopes, return_lse, out, backend
    )
    return state if return_lse else state.out


def _paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    layout: str,
    sm_scale: float | None,
    soft_cap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    return_lse: bool,
    out: torch.Tensor | None,
    backend: str,
) -> AttentionState:
    key_pages, value_pages = to_nhd(key_pages, value_pages, layout)
    options = _checked_options(query, key_pages, value_pages, plan, sm_scale, soft_cap, sinks, alibi_slopes, layout)
    if out is None:
        out = query.new_empty(plan.num_tokens, plan.num_q_heads, plan.value_dim)
    else:
        _check_out(out, query, plan)
        _check_no_overlap(
            out, query=query, key_pages=key_pages, value_pages=value_pages, sinks=sinks, alibi=alibi_slopes
        )
    lse = query.new_empty(plan.num_tokens, plan.num_q_heads, dtype=torch.float32) if return_lse else None
    call = _describe(query, key_pages, value_pages, plan, options)
    select(call, backend)(query, key_pages, value_pages, plan, options, out, lse)
    return AttentionState(out, query.new_empty(0, dtype=torch.float32) if lse is None else lse)


def _checked_options(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    sm_scale: float | None,
    soft_cap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    layout: str,
) -> AttentionOptions:
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan must be an AttentionPlan, got {type(plan).__name__}. Build it with plan_attention.")
    shapes = Shapes()
    for symbol, size in (
        ("T", plan.num_tokens),
        ("Hq", plan.num_q_heads),
        ("Hk", plan.num_kv_heads),
        ("D", plan.head_dim),
        ("Dv", plan.value_dim),
        ("P", plan.page_size),
    ):
        shapes.bind(symbol, size, "the plan")
    check_kv_pages(shapes, key_pages, value_pages, layout)
    shapes.check("query", query, "T Hq D")
    check_floating("query", query)
    check_last_dim_contiguous("query", query)
    for name, tensor in (("query", query), ("the plan", plan.query_indptr)):
        check_device(name, tensor, key_pages.device, "key_pages")
    if plan.max_page >= shapes["N"]:
        raise ValueError(f"page ids of the plan must be below {shapes['N']} (N of key_pages), got {plan.max_page}.")
    for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if per_head is not None:
            shapes.check(name, per_head, "Hq")
            check_dtype(name, per_head, torch.float32)
            check_device(name, per_head, query.device, "query")
    scale = 1.0 / math.sqrt(plan.head_dim) if sm_scale is None else _as_float32("sm_scale", sm_scale)
    cap = _as_float32("soft_cap", soft_cap)
    if cap < 0 or (cap == 0 and soft_cap != 0):
        raise ValueError(f"soft_cap must be 0 (off) or a positive float32, got {soft_cap}.")
    # Kernels read both as flat arrays.
    sinks, alibi_slopes = (None if per_head is None else per_head.contiguous() for per_head in (sinks, alibi_slopes))
    return AttentionOptions(scale, cap, sinks, alibi_slopes)


def _as_float32(name: str, value: Any) -> float:
    """The value as kernels compute with it; refuses what is not a finite number there."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except (OverflowError, struct.error):
        rounded = math.inf
    if not math.isfinite(rounded):
        raise ValueError(f"{name} must be a finite float32, got {value}.")
    return rounded


def _check_out(out: torch.Tensor, query: torch.Tensor, plan: AttentionPlan) -> None:
    Shapes(T=plan.num_tokens, Hq=plan.num_q_heads, Dv=plan.value_dim).check("out", out, "T Hq Dv")
    check_dtype("out", out, query.dtype)
    check_device("out", out, query.device, "query")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}.")


def _check_no_overlap(out: torch.Tensor, **inputs: torch.Tensor | None) -> None:
    for name, tensor in inputs.items():
        if tensor is not None and _overlap(out, tensor):
            raise ValueError(f"out must not overlap {name}, got memory that both use. Pass a tensor of its own.")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Conservative: whether the address ranges of two tensors meet."""
    if not a.numel() or not b.numel():
        return False
    (a_start, a_end), (b_start, b_end) = _address_range(a), _address_range(b)
    return a_start < b_end and b_start < a_end


def _address_range(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _describe(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
) -> OpCall:
    features = []
    if options.soft_cap:
        features.append("soft_cap")
    if options.sinks is not None:
        features.append("sinks")
    if options.alibi_slopes is not None:
        features.append("alibi_slopes")
    if plan.custom_mask is not None:
        features.append("custom_mask")
    return OpCall(
        "paged_attention",
        query.device.type,
        (query.dtype, key_pages.dtype, value_pages.dtype),
        plan.head_dim,
        plan.value_dim,
        frozenset(features),
    )


@torch.library.custom_op("pagedkv::paged_attention", mutates_args=())
def _paged_attention_op(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan_tensors: Sequence[torch.Tensor],
    mask_tensors: Sequence[torch.Tensor],
    plan_numbers: Sequence[int],
    layout: str,
    sm_scale: float | None,
    soft_cap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = AttentionPlan.unpack(plan_tensors, mask_tensors, plan_numbers)
    state = _paged_attention(
        query, key_pages, value_pages, plan, layout, sm_scale, soft_cap, sinks, alibi_slopes, return_lse, None, backend
    )
    return state.out, state.lse


@_paged_attention_op.register_fake
def _paged_attention_shape(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan_tensors: Sequence[torch.Tensor],
    mask_tensors: Sequence[torch.Tensor],
    plan_numbers: Sequence[int],
    layout: str,
    sm_scale: float | None,
    soft_cap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = query.new_empty(query.shape[0], query.shape[1], value_pages.shape[3])
    lse_shape = query.shape[:2] if return_lse else (0,)
    return out, query.new_empty(lse_shape, dtype=torch.float32)


def _traced(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    layout: str,
    sm_scale: float | None,
    soft_cap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    return_lse: bool,
    out: torch.Tensor | None,
    backend: str,
) -> torch.Tensor | AttentionState:
    """The call as torch.compile sees it: one opaque op over the plan's tensors and numbers."""
    result, lse = _paged_attention_op(
        query,
        key_pages,
        value_pages,
        *plan.pack(),
        layout,
        sm_scale,
        soft_cap,
        sinks,
        alibi_slopes,
        return_lse,
        backend,
    )
    if out is not None:
        _check_out(out, query, plan)
        result = out.copy_(result)
    return AttentionState(result, lse) if return_lse else result
