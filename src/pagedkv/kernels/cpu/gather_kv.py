"""gather_kv on the native core (csrc/gather_kv.cpp)."""

from __future__ import annotations

import torch

from .native import core

__all__ = ["gather_kv"]


def gather_kv(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Pages in NHD order; fills key and value; the core checks the slots."""
    core().gather_kv(key_pages, value_pages, slots, key, value, torch.get_num_threads())
