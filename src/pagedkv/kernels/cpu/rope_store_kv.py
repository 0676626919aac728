"""rope_store_kv: turned in torch, stored by the native core."""

from __future__ import annotations

import torch

from ..reference.rope import rotate
from ..rope import RotaryEmbedding
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
    """Pages in NHD order; the core checks the slots before it writes."""
    angles = positions.to(torch.float64)[:, None] * rope.inverse_frequencies()
    cos, sin = angles.cos().float(), angles.sin().float()
    # Both before anything is written: query and key may lie in the pages, and a slot may be refused.
    rotated_query, rotated_key = (rotate(x.float(), cos, sin, rope.interleaved) for x in (query, key))
    store_kv(rotated_key.to(key.dtype), value, key_pages, value_pages, slot_mapping, key_scales, value_scales)
    out.copy_(rotated_query)
