"""One sequence with contiguous keys and values: a batch of one whose only page is all of it."""

from __future__ import annotations

import torch

from ...storage import PageTable
from .arguments import Scale
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
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    o_dtype: torch.dtype | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Shapes: q [Tq, Hq, D]; k [L, Hk, D], v [L, Hk, Dv] ("HND": [Hk, L, D]). Scales are numbers, or one a head."""
    check_kv_layout(kv_layout)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dims, got shape {list(tensor.shape)}.")
    length, heads = (k.shape[0], k.shape[1]) if kv_layout == "NHD" else (k.shape[1], k.shape[0])
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v must have the rows and heads of k, {list(k.shape[:2])}, got {list(v.shape[:2])}.")
    table = PageTable(*_one_page(length, q.device), page_size=max(length, 1))
    if o_dtype is None:
        o_dtype = torch.bfloat16 if q.dtype in FLOAT8_DTYPES else q.dtype
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
        o_data_type=o_dtype,
        layout=kv_layout,
    )
    if not length:
        k, v = (x.new_empty((1, heads, x.shape[2]) if kv_layout == "NHD" else (heads, 1, x.shape[2])) for x in (k, v))
    return batch.run(q, k[None], v[None], q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)


def _one_page(length: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """CSR arrays of one sequence in page 0, or without a page where it is empty."""
    arrays = ([0, 1], [0], [length]) if length else ([0, 0], [], [0])
    return tuple(torch.tensor(array, dtype=torch.int32, device=device) for array in arrays)
