"""Attention of new tokens over keys and values in pages: decode, append, prefill and mixed batches in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..shapes import QUANTISED_DTYPES, Shapes, check_device, check_dtype, check_floating, check_last_dim_contiguous
from .attention_checks import check_contiguous, check_no_overlap
from .attention_options import OUT_DTYPES, AttentionOptions, AttentionRequest
from .attention_plan import AttentionPlan
from .backend import OpCall, select
from .exp_table import ExpTable
from .merge_states import AttentionState
from .pages import check_kv_pages, check_no_grad, to_nhd
from .rope import RotaryEmbedding

__all__ = ["AttentionOptions", "paged_attention"]

_PAGE_DTYPES = (*OUT_DTYPES, *QUANTISED_DTYPES)


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
    rope: RotaryEmbedding | None = None,
    key_scales: float | torch.Tensor | None = None,
    value_scales: float | torch.Tensor | None = None,
    softmax: str | ExpTable = "exact",
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor | AttentionState:
    """Attention of each sequence's last q_len tokens over all its keys, read through the page table.

    Shapes: query [T, Hq, D]; key_pages [N, P, Hk, D]; value_pages [N, P, Hk, Dv] ("HND": [N, Hk, P, D]), which may be
            int8, float8_e4m3fn or float8_e5m2, too; out [T, Hq, Dv] in out_dtype, by default that of query; with
            return_lse AttentionState(out, lse), lse [T, Hq] float32, natural logarithm.
    Rule:   row i of a sequence stands at position kv_len - q_len + i; query head h reads KV head h // (Hq / Hk);
            logit = sm_scale * q.k (sm_scale defaults to 1 / sqrt(D)); soft_cap c > 0: c * tanh(logit / c);
            alibi_slopes [Hq] float32 add slope * (key position - row position); then mask, window and softmax;
            sinks [Hq] float32 are logits that join the denominator alone.
            A row that sees no key gives exactly 0 and -inf. Accumulation is float32.
    Scales: a key is its element in the page times its scale, a value likewise. key_scales, value_scales: a float for
            all; float32 [N, Hk, P] for each token and head of quantised pages, in either layout; None is 1, but int8
            pages must have scales.
    Rope:   with a RotaryEmbedding the pages hold keys before rotation; row and key are turned by the angles of their
            positions before the dot product. A row of a sequence with more rows than keys may stand before 0.
    Softmax: "exact"; or "lut", the exponentials of weights from the table `ExpTable()`, or from one given: within its
            relative error of the exact ones, those of masked keys exactly 0. It is not faster (docs/benchmarks.md).
    When:   after the keys and values of the new tokens are stored.
    Owns:   writes `out` alone, which must not overlap the inputs. Slots beyond a sequence's length, and their scales,
            are never used.
    Raises: ValueError, TypeError for what breaks the lines above and for a tensor that requires a gradient while
            gradients are recorded; BackendUnavailableError for an explicit back end that cannot run it.
    Source: PagedAttention (arXiv 2309.06180); online softmax (arXiv 1805.02867); rotation: RoFormer (arXiv 2104.09864).
            Reference: kernels/reference/paged_attention.py.
    """
    request = AttentionRequest(
        sm_scale, soft_cap, sinks, alibi_slopes, rope, key_scales, value_scales, out_dtype, softmax
    )
    if torch.is_grad_enabled():
        check_no_grad(query=query, key_pages=key_pages, value_pages=value_pages, out=out, **request.tensors())
    run = _traced if torch.compiler.is_compiling() else _paged_attention
    result, lse = run(query, key_pages, value_pages, plan, layout, request, return_lse, out, backend)
    return result if lse is None else AttentionState(result, lse)


def _paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    layout: str,
    request: AttentionRequest,
    return_lse: bool,
    out: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    key_pages, value_pages = to_nhd(key_pages, value_pages, layout)
    # Looking once costs a fraction of checking rule by rule, which is what finds the words for an error.
    if not _is_plainly_right(query, key_pages, value_pages, plan):
        _check_tensors(query, key_pages, value_pages, plan, layout)
    options = request.checked(key_pages, plan)
    out_dtype = request.out_dtype or query.dtype
    if out is None:
        out = torch.empty(plan.num_tokens, plan.num_q_heads, plan.value_dim, dtype=out_dtype, device=query.device)
    else:
        _check_out(out, query, plan, out_dtype)
        check_no_overlap("out", out, query=query, key_pages=key_pages, value_pages=value_pages, **request.tensors())
    lse = query.new_empty((plan.num_tokens, plan.num_q_heads), dtype=torch.float32) if return_lse else None
    features = options.features()
    if plan.custom_mask is not None:
        features.append("custom_mask")
    call = OpCall(
        "paged_attention",
        query.device.type,
        (query.dtype, key_pages.dtype, value_pages.dtype, out_dtype),
        plan.head_dim,
        plan.value_dim,
        frozenset(features),
    )
    select(call, backend)(query, key_pages, value_pages, plan, options, out, lse)
    return out, lse


def _is_plainly_right(query: object, key_pages: torch.Tensor, value_pages: torch.Tensor, plan: object) -> bool:
    """True only for what `_check_tensors` lets pass."""
    if not isinstance(plan, AttentionPlan) or not isinstance(query, torch.Tensor):
        return False
    num_pages, dtype, device = key_pages.shape[0], key_pages.dtype, key_pages.device
    return bool(
        query.shape == (plan.num_tokens, plan.num_q_heads, plan.head_dim)
        and key_pages.shape == (num_pages, plan.page_size, plan.num_kv_heads, plan.head_dim)
        and value_pages.shape == (num_pages, plan.page_size, plan.num_kv_heads, plan.value_dim)
        and query.stride(2) == key_pages.stride(3) == value_pages.stride(3) == 1
        and query.dtype in OUT_DTYPES
        and dtype in _PAGE_DTYPES
        and value_pages.dtype == dtype
        and query.device == value_pages.device == plan.query_indptr.device == device
        and plan.max_page < num_pages
        and not query.is_neg()
    )


def _check_tensors(
    query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, plan: AttentionPlan, layout: str
) -> None:
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
    check_kv_pages(shapes, key_pages, value_pages, layout, quantised=True)
    shapes.check("query", query, "T Hq D")
    check_floating("query", query)
    check_last_dim_contiguous("query", query)
    for name, tensor in (("query", query), ("the plan", plan.query_indptr)):
        check_device(name, tensor, key_pages.device, "key_pages")
    if plan.max_page >= shapes["N"]:
        raise ValueError(f"page ids of the plan must be below {shapes['N']} (N of key_pages), got {plan.max_page}.")


def _check_out(out: torch.Tensor, query: torch.Tensor, plan: AttentionPlan, out_dtype: torch.dtype) -> None:
    # Shapes asks what a graph cannot hold, so only for its words.
    if not isinstance(out, torch.Tensor) or out.shape != (plan.num_tokens, plan.num_q_heads, plan.value_dim):
        Shapes(T=plan.num_tokens, Hq=plan.num_q_heads, Dv=plan.value_dim).check("out", out, "T Hq Dv")
    check_dtype("out", out, out_dtype)
    check_device("out", out, query.device, "query")
    check_contiguous("out", out)


@torch.library.custom_op("pagedkv::paged_attention", mutates_args=())
def _paged_attention_op(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan_tensors: Sequence[torch.Tensor],
    mask_tensors: Sequence[torch.Tensor],
    plan_numbers: Sequence[int],
    layout: str,
    option_tensors: Sequence[torch.Tensor | None],
    option_floats: Sequence[float],
    option_flags: Sequence[int],
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = AttentionPlan.unpack(plan_tensors, mask_tensors, plan_numbers)
    request = AttentionRequest.unpack(option_tensors, option_floats, option_flags)
    out, lse = _paged_attention(query, key_pages, value_pages, plan, layout, request, return_lse, None, backend)
    return out, query.new_empty(0, dtype=torch.float32) if lse is None else lse


@_paged_attention_op.register_fake
def _paged_attention_shape(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan_tensors: Sequence[torch.Tensor],
    mask_tensors: Sequence[torch.Tensor],
    plan_numbers: Sequence[int],
    layout: str,
    option_tensors: Sequence[torch.Tensor | None],
    option_floats: Sequence[float],
    option_flags: Sequence[int],
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    request = AttentionRequest.unpack(option_tensors, option_floats, option_flags)
    out = query.new_empty(query.shape[0], query.shape[1], value_pages.shape[3], dtype=request.out_dtype)
    lse_shape = query.shape[:2] if return_lse else (0,)
    return out, query.new_empty(lse_shape, dtype=torch.float32)


def _traced(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    layout: str,
    request: AttentionRequest,
    return_lse: bool,
    out: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The call as torch.compile sees it: one opaque op over the numbers and tensors of plan and request."""
    result, lse = _paged_attention_op(
        query, key_pages, value_pages, *plan.pack(), layout, *request.pack(), return_lse, backend
    )
    if out is not None:
        _check_out(out, query, plan, request.out_dtype or query.dtype)
        result = out.copy_(result)
    return result, lse if return_lse else None
