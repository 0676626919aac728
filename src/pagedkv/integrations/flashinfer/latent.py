"""Plan and run of latent attention, as both wrappers of flashinfer.mla use them."""

from __future__ import annotations

from typing import Any

import torch

from ...kernels import AttentionState, mla_attention
from ...shapes import Shapes, check_int, dtype_name
from ...spec import CACHE_DTYPES
from ...storage import PageTable
from .arguments import check_result_buffer
from .planned import Logits, PlannedBatch, plan_batch
from .utils import log2e

__all__ = ["plan_latent", "required_scale", "run_latent"]

_NAMES = ("q_nope", "q_pe", "ckv_cache", "kpe_cache")


def required_scale(sm_scale: float | None) -> float:
    """Raises TypeError for None: a compressed cache does not show the head dims that a default would follow."""
    if sm_scale is None:
        raise TypeError("sm_scale must be a number, got None: it follows the head dims before compression.")
    return float(sm_scale)


def plan_latent(
    qo_indptr: torch.Tensor,
    table: PageTable,
    num_heads: int,
    latent_dim: int,
    rope_dim: int,
    *,
    causal: bool = False,
    window_left: int = -1,
    logits: Logits,
    q_data_type: str | torch.dtype,
    kv_data_type: str | torch.dtype,
) -> PlannedBatch:
    """A batch whose one KV head is latent and rope key, side by side, and whose values are the latents.

    Raises: ValueError for a dtype other than those of `mla_attention`; what `plan_batch` raises.
    """
    check_int("head_dim_ckv", latent_dim, minimum=1)
    check_int("head_dim_kpe", rope_dim, minimum=0)
    batch = plan_batch(
        qo_indptr,
        table,
        num_qo_heads=num_heads,
        num_kv_heads=1,
        head_dim_qk=latent_dim + rope_dim,
        head_dim_vo=latent_dim,
        causal=causal,
        window_left=window_left,
        logits=logits,
        q_data_type=q_data_type,
        kv_data_type=kv_data_type,
    )
    for name, dtype in (("q_data_type", batch.q_dtype), ("kv_data_type", batch.kv_dtype)):
        if dtype not in CACHE_DTYPES:
            allowed = ", ".join(dtype_name(each) for each in CACHE_DTYPES)
            raise ValueError(f"{name} of latent attention must be one of {allowed}, got {dtype_name(dtype)}.")
    return batch


def run_latent(
    batch: PlannedBatch,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor | None,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor | None,
    *,
    names: tuple[str, str, str, str] = _NAMES,
    logit_scale: float = 1.0,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    lse_unit: float = log2e,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Latent attention of one layer.

    Shapes: q_nope [T, H, C]; q_pe [T, H, R]; ckv_cache [N, P, C]; kpe_cache [N, P, R]; out [T, H, C]; lse [T, H]
            float32, the natural one times lse_unit. names are what errors call the four tensors.
    Raises: ValueError, TypeError for a dtype other than the plan's and for shapes, before anything is written.
    """
    tensors = dict(zip(names, (q_nope, q_pe, ckv_cache, kpe_cache), strict=True))
    _check_tensors(batch, tensors)
    if out is not None:
        check_result_buffer("out", out, tuple(q_nope.shape), batch.q_dtype, q_nope.device, **tensors)
    if lse is not None:
        check_result_buffer("lse", lse, tuple(q_nope.shape[:2]), torch.float32, q_nope.device, **tensors, out=out)
    if out_scale != 1.0:
        # The output is scaled in float32, so that nothing is rounded twice.
        q_nope, q_pe = q_nope.float(), None if q_pe is None else q_pe.float()
    # A buffer with gaps, or of another dtype than the queries now have, is filled from one of our own.
    writes_out = out is not None and out.is_contiguous() and out.dtype == q_nope.dtype
    state = mla_attention(
        q_nope,
        q_pe,
        ckv_cache,
        kpe_cache,
        batch.plan,
        sm_scale=required_scale(batch.logits.sm_scale) * logit_scale,
        return_lse=return_lse or lse is not None,
        out=out if writes_out else None,
    )
    result = state.out if isinstance(state, AttentionState) else state
    if out_scale != 1.0:
        result = result.mul_(out_scale)
    result = result.to(batch.q_dtype) if out is None or writes_out else out.copy_(result)
    if not isinstance(state, AttentionState):
        return result
    sums = state.lse.mul_(lse_unit)
    sums = sums if lse is None else lse.copy_(sums)
    return (result, sums) if return_lse else result


def _check_tensors(batch: PlannedBatch, tensors: dict[str, Any]) -> None:
    plan = batch.plan
    rope_dim = plan.head_dim - plan.value_dim
    sizes = {"T": plan.num_tokens, "H": plan.num_q_heads, "P": plan.page_size, "C": plan.value_dim, "R": rope_dim}
    shapes = Shapes()
    for symbol, size in sizes.items():
        shapes.bind(symbol, size, "plan")
    for (name, tensor), pattern in zip(tensors.items(), ("T H C", "T H R", "N P C", "N P R"), strict=True):
        if tensor is None and not rope_dim and pattern.endswith("R"):
            continue
        shapes.check(name, tensor, pattern)
        expected = batch.q_dtype if pattern.startswith("T") else batch.kv_dtype
        if tensor.dtype != expected:
            got = dtype_name(tensor.dtype)
            raise ValueError(f"{name} must have dtype {dtype_name(expected)} (set by plan), got {got}.")
