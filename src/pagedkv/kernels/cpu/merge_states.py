"""merge_states on the native core (csrc/merge_states.cpp)."""

from __future__ import annotations

import torch

from .native import core

__all__ = ["merge_states"]


def merge_states(values: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, out_lse: torch.Tensor) -> None:
    """Fills out and out_lse; everything is checked."""
    core().merge_states(values, lse, out, out_lse, torch.get_num_threads())
