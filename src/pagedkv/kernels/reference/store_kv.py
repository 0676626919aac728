"""store_kv in plain torch: the specification."""

from __future__ import annotations

import torch

from ..pages import check_slots

__all__ = ["store_kv"]


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Pages in NHD order; everything but the slots is checked."""
    num_pages, page_size = key_pages.shape[:2]
    check_slots("slot_mapping", slot_mapping, num_pages * page_size)
    # Token by token in order, so that of equal slots the last one wins; index_put_ promises no order for duplicates.
    last_of_slot = {slot: token for token, slot in enumerate(slot_mapping.tolist()) if slot >= 0}
    if not last_of_slot:
        return
    slots = torch.tensor(list(last_of_slot), device=key_pages.device)
    tokens = torch.tensor(list(last_of_slot.values()), device=key_pages.device)
    pages, offsets = slots // page_size, slots % page_size
    # Copies of both before the first write: key and value may lie in the pages.
    new_key, new_value = key[tokens], value[tokens]
    key_pages[pages, offsets] = new_key
    value_pages[pages, offsets] = new_value
