"""store_kv on the native core (csrc/store_kv.cpp, csrc/store_kv_quantized.cpp)."""

from __future__ import annotations

import torch

from ..pages import mark_written
from .native import core

__all__ = ["store_kv"]


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Pages in NHD order; the core checks the slots before it writes."""
    if key_scales is None or value_scales is None:
        core().store_kv(key, value, key_pages, value_pages, slot_mapping, torch.get_num_threads())
        mark_written(key_pages, value_pages)
        return
    core().store_kv_quantized(
        key, value, key_pages, value_pages, slot_mapping, key_scales, value_scales, torch.get_num_threads()
    )
    mark_written(key_pages, value_pages, key_scales, value_scales)
