"""store_kv in plain torch: the specification."""

from __future__ import annotations

import torch

from ..pages import check_slots
from .quantize import quantize_kv

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
    """Pages in NHD order, scales [N, Hk, P]; everything but the slots is checked."""
    num_pages, page_size = key_pages.shape[:2]
    check_slots("slot_mapping", slot_mapping, num_pages * page_size)
    # Token by token in order, so that of equal slots the last one wins; index_put_ promises no order for duplicates.
    last_of_slot = {slot: token for token, slot in enumerate(slot_mapping.tolist()) if slot >= 0}
    if not last_of_slot:
        return
    slots = torch.tensor(list(last_of_slot), device=key_pages.device)
    tokens = torch.tensor(list(last_of_slot.values()), device=key_pages.device)
    at = slots // page_size, slots % page_size
    # Copies of both before the first write: key and value may lie in the pages.
    new_key, new_value = key[tokens], value[tokens]
    for new, pages, scales in ((new_key, key_pages, key_scales), (new_value, value_pages, value_scales)):
        if scales is None:
            pages[at] = new
        else:
            codes = torch.empty_like(new, dtype=pages.dtype, memory_format=torch.contiguous_format)
            new_scales = torch.empty(new.shape[:2], dtype=torch.float32, device=new.device)
            quantize_kv(new, codes, new_scales)
            pages[at] = codes
            scales.transpose(1, 2)[at] = new_scales
