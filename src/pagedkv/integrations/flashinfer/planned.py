"""One planned batch with FlashInfer's options: what every wrapper makes in `plan` and runs layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ...attention import plan_attention
from ...kernels import AttentionPlan, AttentionState, RotaryEmbedding, paged_attention
from ...shapes import dtype_name
from ...storage import PageTable
from .arguments import (
    Scale,
    as_scalar,
    canonical_dtype,
    check_pos_encoding_mode,
    check_result_buffer,
    int32_indices,
)
from .head_scales import by_head, is_by_head
from .utils import get_alibi_slopes, log2e

__all__ = ["FLOAT8_DTYPES", "Logits", "PlannedBatch", "plan_batch", "rounded"]

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Logits:
    """How dot products become logits, as FlashInfer names it; None stands for its default."""

    pos_encoding_mode: str = "NONE"
    sm_scale: float | None = None
    logits_soft_cap: float | None = None
    rope_scale: float | None = None
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        check_pos_encoding_mode(self.pos_encoding_mode)
        for name, value in (("sm_scale", self.sm_scale), ("logits_soft_cap", self.logits_soft_cap)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}.")

    @property
    def soft_cap(self) -> float:
        """0 for none: FlashInfer takes None, 0 and negative numbers for it."""
        return max(0.0, float(self.logits_soft_cap or 0.0))

    def rope(self, head_dim: int) -> RotaryEmbedding | None:
        """The rotation that keys in the cache still lack."""
        if self.pos_encoding_mode != "ROPE_LLAMA":
            return None
        theta = 1e4 if self.rope_theta is None else float(self.rope_theta)
        return RotaryEmbedding(dim=head_dim, theta=theta, scale=1.0 if self.rope_scale is None else self.rope_scale)


@dataclass(frozen=True, eq=False)
class PlannedBatch:
    """Query rows, pages, mask and logits of one `plan`, with the dtypes it was told of.

    slopes:   ALiBi slopes [Hq] float32, or None.
    shifts:   [T, Hq] float32, or None: FlashInfer measures ALiBi distances from the row's index and not from its
              position, which moves the LSE of a row, not its output.
    """

    plan: AttentionPlan
    logits: Logits
    layout: str
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    out_dtype: torch.dtype
    rope: RotaryEmbedding | None
    slopes: torch.Tensor | None
    shifts: torch.Tensor | None

    def run(
        self,
        q: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        *,
        layout: str | None = None,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        sm_scale: float | None = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer.

        Shapes: q [T, Hq, D]; key_pages [N, P, Hk, D]; value_pages [N, P, Hk, Dv] ("HND": [N, Hk, P, D]); out
                [T, Hq, Dv]; lse [T, Hq] float32, base 2. Scales are numbers, or q_scale [Hq], k_scale, v_scale [Hk];
                sm_scale in place of the plan's.
        Owns:   writes out and lse where given, lse also without return_lse.
        Raises: ValueError for a dtype other than the plan's, and for shapes, before anything is written.
        """
        plan = self.plan
        if q.dtype != self.q_dtype:
            raise ValueError(f"q must have dtype {dtype_name(self.q_dtype)} (set by plan), got {dtype_name(q.dtype)}.")
        if key_pages.dtype != self.kv_dtype or value_pages.dtype != self.kv_dtype:
            raise ValueError(
                f"keys and values must have dtype {dtype_name(self.kv_dtype)} (set by plan), got "
                f"{dtype_name(key_pages.dtype)} and {dtype_name(value_pages.dtype)}."
            )
        if q.shape[0] != plan.num_tokens:
            raise ValueError(f"q must have {plan.num_tokens} rows (qo_indptr[-1] of plan), got {q.shape[0]}.")
        result_shape = (plan.num_tokens, plan.num_q_heads, plan.value_dim)
        if out is not None:
            inputs = {"q": q, "keys": key_pages, "values": value_pages}
            check_result_buffer("out", out, result_shape, self.out_dtype, q.device, **inputs)
        if lse is not None:
            inputs = {"q": q, "keys": key_pages, "values": value_pages}
            check_result_buffer("lse", lse, result_shape[:2], torch.float32, q.device, **inputs, out=out)
        if is_by_head(q_scale, k_scale, v_scale):
            scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
            options = {"layout": layout, "sm_scale": sm_scale, "sinks": sinks, "lse": lse, "return_lse": return_lse}
            return self._run_by_head(q, key_pages, value_pages, scales, out, options)
        scale = self.logits.sm_scale if sm_scale is None else sm_scale
        if q_scale is not None or k_scale is not None:
            scale = 1.0 / math.sqrt(plan.head_dim) if scale is None else scale
            scale = scale * as_scalar("q_scale", q_scale) * as_scalar("k_scale", k_scale)
        # Results in 8 bits are rounded from float32; a buffer with gaps is filled from one without.
        writes_out = out is not None and self.out_dtype in _OUT_DTYPES and out.is_contiguous()
        state = paged_attention(
            q if self.q_dtype in _OUT_DTYPES else q.to(torch.float16),
            key_pages,
            value_pages,
            plan,
            layout=self.layout if layout is None else layout,
            sm_scale=scale,
            soft_cap=self.logits.soft_cap,
            sinks=sinks,
            alibi_slopes=self.slopes,
            rope=self.rope,
            value_scales=None if v_scale is None else as_scalar("v_scale", v_scale),
            return_lse=return_lse or lse is not None,
            out=out if writes_out else None,
            out_dtype=self.out_dtype if self.out_dtype in _OUT_DTYPES else torch.float32,
        )
        result = state.out if isinstance(state, AttentionState) else state
        if result.dtype != self.out_dtype:
            result = rounded(result, self.out_dtype)
        if out is not None and not writes_out:
            result = out.copy_(result)
        if not isinstance(state, AttentionState):
            return result
        natural = state.lse if self.shifts is None else state.lse.add_(self.shifts)
        if lse is None:
            return result, natural.mul_(log2e)
        lse.copy_(natural.mul_(log2e))
        return (result, lse) if return_lse else result

    def run_with_lse(
        self, q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`run` with return_lse: output and LSE."""
        return cast(tuple[torch.Tensor, torch.Tensor], self.run(q, key_pages, value_pages, return_lse=True, **options))

    def _run_by_head(
        self,
        q: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        scales: dict[str, Scale],
        out: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """A factor of a head is one of its query and of its output: in float32, so that nothing is rounded twice."""
        heads, group = self.plan.num_kv_heads, self.plan.group
        of_query = by_head("q_scale", scales["q_scale"], heads * group, 1, q.device)
        of_query = of_query * by_head("k_scale", scales["k_scale"], heads, group, q.device)
        of_output = by_head("v_scale", scales["v_scale"], heads, group, q.device)
        batch = replace(self, q_dtype=torch.float32, out_dtype=torch.float32)
        result = batch.run(q.float() * of_query, key_pages, value_pages, **options)
        values, *rest = result if isinstance(result, tuple) else (result,)
        values = rounded(values.mul_(of_output), self.out_dtype)
        values = values if out is None else out.copy_(values)
        return (values, rest[0]) if rest else values

    def changed(self, *, causal: bool | None = None, window_left: int | None = None, **logits: Any) -> PlannedBatch:
        """The same batch with other options: causal and window of the plan, and any field of `Logits`."""
        plan = self.plan
        causal = plan.causal if causal is None or plan.custom_mask is not None else causal
        window_left = plan.window_left if window_left is None else _window(window_left)
        if (causal, window_left) != (plan.causal, plan.window_left):
            # The division of work follows what rows see; without one the back end makes its own.
            plan = replace(plan, causal=causal, window_left=window_left, work=None)
        changed = replace(self.logits, **logits)
        return replace(self, plan=plan, logits=changed, **_of_positions(plan, changed))


def plan_batch(
    qo_indptr: torch.Tensor,
    table: PageTable,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int | None = None,
    causal: bool = False,
    window_left: int = -1,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    logits: Logits | None = None,
    q_data_type: str | torch.dtype = "float16",
    kv_data_type: str | torch.dtype | None = None,
    o_data_type: str | torch.dtype | None = None,
    layout: str = "NHD",
) -> PlannedBatch:
    """Checks a batch and divides its work.

    Shapes: qo_indptr [B + 1] int32 or int64, on any device; custom_mask bool, each sequence's [qo_len, kv_len]
            row-major, one after the other; packed_custom_mask uint8, the same as bits, the lowest first, each sequence
            from a byte of its own on; it wins over custom_mask. A mask takes the place of causal; the window stays.
    Raises: ValueError, TypeError for what `plan_attention` refuses.
    """
    logits = Logits() if logits is None else logits
    q_dtype = canonical_dtype("q_data_type", q_data_type)
    kv_dtype = q_dtype if kv_data_type is None else canonical_dtype("kv_data_type", kv_data_type)
    out_dtype = q_dtype if o_data_type is None else canonical_dtype("o_data_type", o_data_type)
    device = table.indptr.device
    masked = custom_mask is not None or packed_custom_mask is not None
    plan = plan_attention(
        int32_indices("qo_indptr", qo_indptr, device),
        table,
        num_q_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim_qk,
        value_dim=head_dim_vo,
        causal=bool(causal) and not masked,
        window_left=_window(window_left),
        custom_mask=_flat_mask(custom_mask, device) if packed_custom_mask is None else None,
        packed_mask=None if packed_custom_mask is None else packed_custom_mask.to(device).flatten(),
    )
    return PlannedBatch(
        plan=plan,
        logits=logits,
        layout=layout,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        out_dtype=out_dtype,
        **_of_positions(plan, logits),
    )


def _of_positions(plan: AttentionPlan, logits: Logits) -> dict[str, Any]:
    """What the mode of positions needs of a plan."""
    slopes = shifts = None
    if logits.pos_encoding_mode == "ALIBI":
        device = plan.query_indptr.device
        slopes = get_alibi_slopes(plan.num_q_heads).to(device)
        q_lens = plan.query_indptr[1:] - plan.query_indptr[:-1]
        offsets = torch.repeat_interleave((plan.seq_lens - q_lens).float(), q_lens)
        shifts = offsets[:, None] * slopes
    return {"rope": logits.rope(plan.head_dim), "slopes": slopes, "shifts": shifts}


def _window(window_left: int) -> int:
    """FlashInfer takes any negative number for no window."""
    return window_left if window_left >= 0 else -1


def _flat_mask(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    if mask is None:
        return None
    if mask.dtype not in (torch.bool, torch.uint8):
        # A mask to be added would come out inverted.
        raise ValueError(f"custom_mask must have dtype bool or uint8, got {dtype_name(mask.dtype)}.")
    return mask.to(device=device, dtype=torch.bool).flatten()


def rounded(result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """From float32; numbers beyond the largest of 8 bits become that one, for e4m3fn has no infinity."""
    if dtype in FLOAT8_DTYPES:
        largest = torch.finfo(dtype).max
        result = result.clamp(-largest, largest)
    return result.to(dtype)
