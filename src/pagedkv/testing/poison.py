"""Poison for memory that nobody may read: NaN in what was never written and in slots that no sequence owns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..shapes import QUANTISED_DTYPES
from ..storage.page_table import PageTable
from ..storage.pool import KVPool

__all__ = ["owned_slots", "poison_unused", "poisoned_memory"]

# Of both float8 the bits of a NaN; int8 has none, and its largest code stands for NaN only with the scale of its slot.
_POISON_BYTE = 0x7F


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, torch.empty and its kin give NaN (integers: the largest value) instead of whatever was there.

    Limits: by torch's deterministic mode, which is set for the time and restored after; numpy is not covered.

    >>> with poisoned_memory():
    ...     torch.empty(2)
    tensor([nan, nan])
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic  # a module whose attributes are properties, unknown to type checkers
    fill = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        switches.fill_uninitialized_memory = fill


def poison_unused(pages: KVPool | torch.Tensor, table: PageTable, *, layout: str = "NHD") -> None:
    """Fills every slot that no sequence of `table` owns with NaN, the tails of last pages included.

    Shapes: pages [N, P, Hk, D] (layout "HND": [N, Hk, P, D]) of any strides, or a pool: all its layers, in its layout,
            with their scales if it has such. int8 pages get 127, which is NaN by the scale of their slot.
    Raises: ValueError for a table of another page size, or one that names a page beyond the pages.
    """
    if isinstance(pages, KVPool):
        for layer in range(pages.spec.num_layers):
            for view in (pages.key_pages(layer), pages.value_pages(layer)):
                poison_unused(view, table, layout=pages.spec.layout)
            for scales in (pages.key_scales(layer), pages.value_scales(layer)):
                if scales is not None:
                    poison_unused(scales, table, layout="HND")
        return
    in_slot_order = pages.transpose(1, 2) if layout == "HND" else pages
    num_pages, page_size = in_slot_order.shape[:2]
    if page_size != table.page_size:
        raise ValueError(f"pages must have the page size of the table, {table.page_size}, got {page_size}.")
    unused = ~owned_slots(table, num_pages)
    if pages.dtype in QUANTISED_DTYPES:
        in_slot_order.view(torch.uint8)[unused.to(pages.device)] = _POISON_BYTE
    else:
        in_slot_order[unused.to(pages.device)] = torch.nan


def owned_slots(table: PageTable, num_pages: int) -> torch.Tensor:
    """[N, P] bool: the slots that hold a token of some sequence of `table`."""
    if table.max_page >= num_pages:
        raise ValueError(f"table must name pages below {num_pages} (N), got {table.max_page}.")
    indptr, indices = table.indptr.long().cpu(), table.indices.long().cpu()
    starts, num_entries = indptr[:-1], indptr.diff()
    positions = torch.arange(len(indices), device="cpu") - starts.repeat_interleave(num_entries)
    lengths = table.seq_lens.long().cpu().repeat_interleave(num_entries) - positions * table.page_size
    # A page may stand in the table more than once.
    most = torch.zeros(num_pages, dtype=torch.int64, device="cpu").scatter_reduce_(0, indices, lengths, "amax")
    return torch.arange(table.page_size, device="cpu") < most[:, None]
