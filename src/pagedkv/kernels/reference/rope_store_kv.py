"""rope_store_kv in plain torch: the specification."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..rope import RotaryEmbedding
from .rope import cos_sin, rotate
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
    *,
    store: Callable[..., None] = store_kv,
) -> None:
    """Pages in NHD order, scales [N, Hk, P]; fills out; everything but the slots is checked, which `store` does."""
    cos, sin = cos_sin(positions, rope)
    # Both before anything is written: query and key may lie in the pages, and a slot may be refused.
    rotated_query, rotated_key = (rotate(x.float(), cos, sin, rope.interleaved) for x in (query, key))
    store(rotated_key.to(key.dtype), value, key_pages, value_pages, slot_mapping, key_scales, value_scales)
    out.copy_(rotated_query)
