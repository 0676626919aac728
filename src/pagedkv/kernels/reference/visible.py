"""Which keys a row sees: the one rule of mask, causality and window that every attention of the reference follows."""

from __future__ import annotations

import torch

from ..attention_plan import AttentionPlan

__all__ = ["visible_keys"]


def visible_keys(plan: AttentionPlan, sequence: int, q_len: int, kv_len: int) -> torch.Tensor:
    """[q_len, kv_len] bool of one sequence; row i stands at position kv_len - q_len + i."""
    device = plan.seq_lens.device
    positions = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    keys = torch.arange(kv_len, device=device)[None, :]
    if plan.custom_mask is not None and plan.mask_indptr is not None:
        start = int(plan.mask_indptr[sequence])
        visible = plan.custom_mask[start : start + q_len * kv_len].view(q_len, kv_len).clone()
    else:
        visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if plan.causal:
        visible &= keys <= positions
    if plan.window_left >= 0:
        visible &= keys >= positions - plan.window_left
    return visible
