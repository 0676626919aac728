"""quantize_kv on the native core (csrc/quantize_kv.cpp)."""

from __future__ import annotations

import torch

from .native import core

__all__ = ["quantize_kv"]


def quantize_kv(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Fills values and scales; everything is checked."""
    core().quantize_kv(x, values, scales, torch.get_num_threads())
