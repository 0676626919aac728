"""gather_kv in plain torch: the specification."""

from __future__ import annotations

import torch

from ..pages import check_slots

__all__ = ["gather_kv"]


def gather_kv(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Pages in NHD order; fills key and value, everything but the slots is checked."""
    num_pages, page_size = key_pages.shape[:2]
    check_slots("slots", slots, num_pages * page_size)
    named = slots >= 0
    for out, source in ((key, key_pages), (value, value_pages)):
        out.zero_()
        out[named] = source[slots[named] // page_size, slots[named] % page_size]
