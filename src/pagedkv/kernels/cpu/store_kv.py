"""store_kv on the native core (csrc/store_kv.cpp)."""

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
) -> None:
    """Pages in NHD order; the core checks the slots before it writes."""
    core().store_kv(key, value, key_pages, value_pages, slot_mapping, torch.get_num_threads())
    mark_written(key_pages, value_pages)
