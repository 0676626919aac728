"""rope_store_kv in plain torch: the specification."""

from __future__ import annotations

import torch

from ..rope import RotaryEmbedding
from .rope import apply_rope
from .store_kv import store_kv

__all__ = ["rope_store_kv"]


def rope_store_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    rope: RotaryEmbedding,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Pages in NHD order, scales [N, Hk, P]; fills out; everything but the slots is checked."""
    rotated_query, rotated_key = torch.empty_like(out), torch.empty(key.shape, dtype=key.dtype, device=key.device)
    # Both before anything is written: query and key may lie in the pages, and a slot may be refused.
    apply_rope(query, positions, rope, rotated_query)
    apply_rope(key, positions, rope, rotated_key)
    store_kv(rotated_key, value, key_pages, value_pages, slot_mapping, key_scales, value_scales)
    out.copy_(rotated_query)
