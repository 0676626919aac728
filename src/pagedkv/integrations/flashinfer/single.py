"""One sequence with contiguous keys and values: a batch of one whose only page is all of it."""

from __future__ import annotations

import torch

from ...storage import PageTable
from .layouts import check_kv_layout
from .planned import FLOAT8_DTYPES, Logits, plan_batch

__all__ = ["attend_single"]


def attend_single(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: Logits,
    *,
    kv_layout: str,
    causal: bool = False,
    window_left: int = -1,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    q_scale: float | torch.Tensor | None = None,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Shapes: q [Tq, Hq, D]; k [L, Hk, D], v [L, Hk, Dv] ("HND": [Hk, L, D]). Scales are numbers, or one a head."""
    check_kv_layout(kv_layout)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dims, got shape {list(tensor.shape)}.")
    length, heads = (k.shape[0], k.shape[1]) if kv_layout == "NHD" else (k.shape[1], k.shape[0])
    table = PageTable(*_one_page(length, q.device), page_size=max(length, 1))
    if o_dtype is None:
        o_dtype = torch.bfloat16 if q.dtype in FLOAT8_DTYPES else q.dtype
    of_output: torch.Tensor | None = None
    if _is_by_head(q_scale) or _is_by_head(k_scale):
        # A factor a head is one of the query's: float32, so that nothing is rounded twice.
        group = q.shape[1] // max(heads, 1)
        q = q.float() * _by_head("q_scale", q_scale, q.shape[1], 1, q) * _by_head("k_scale", k_scale, heads, group, q)
        q_scale = k_scale = None
    if _is_by_head(v_scale):
        of_output = _by_head("v_scale", v_scale, heads, q.shape[1] // max(heads, 1), q)
        v_scale = None
    batch = plan_batch(
        torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device),
        table,
        num_qo_heads=q.shape[1],
        num_kv_heads=heads,
        head_dim_qk=q.shape[2],
        head_dim_vo=v.shape[2],
        causal=causal,
        window_left=window_left,
        custom_mask=custom_mask,
        packed_custom_mask=packed_custom_mask,
        logits=logits,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
        o_data_type=o_dtype if of_output is None else torch.float32,
        layout=kv_layout,
    )
    if not length:
        k, v = (x.new_empty((1, heads, x.shape[2]) if kv_layout == "NHD" else (heads, 1, x.shape[2])) for x in (k, v))
    result = batch.run(q, k[None], v[None], q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)
    if of_output is None:
        return result
    if isinstance(result, tuple):
        return (result[0] * of_output).to(o_dtype), result[1]
    return (result * of_output).to(o_dtype)


def _one_page(length: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """CSR arrays of one sequence in page 0, or without a page where it is empty."""
    arrays = ([0, 1], [0], [length]) if length else ([0, 0], [], [0])
    return tuple(torch.tensor(array, dtype=torch.int32, device=device) for array in arrays)


def _is_by_head(scale: float | torch.Tensor | None) -> bool:
    return isinstance(scale, torch.Tensor) and scale.numel() > 1


def _by_head(
    name: str, scale: float | torch.Tensor | None, num_heads: int, repeats: int, q: torch.Tensor
) -> torch.Tensor:
    """[num_heads * repeats, 1] float32."""
    if scale is None:
        return torch.ones(1, dtype=torch.float32, device=q.device)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=q.device).flatten()
    if scale.numel() not in (1, num_heads):
        raise ValueError(f"{name} must have 1 or {num_heads} elements (one a head), got {scale.numel()}.")
    return scale.expand(num_heads).repeat_interleave(repeats)[:, None]
