"""FlashInfer's page tables, turned into ours: its quirks of empty sequences and spare pages end here."""

from __future__ import annotations

import numpy as np
import torch

from ...kernels import AttentionPlan
from ...storage import PageTable
from .arguments import int32_indices

__all__ = ["page_table", "page_table_of_lengths", "ragged_pages", "ragged_table", "row_indptr"]


def page_table(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    page_size: int,
    device: torch.device | None = None,
) -> PageTable:
    """From CSR arrays with the tokens of each last page; a sequence without pages may say anything of its last.

    Shapes: indptr [B + 1]; indices [>= indptr[-1]]; last_page_len [B]; int32 or int64, on any device.
    Raises: ValueError for entries that no cache can have, see PageTable.
    """
    indptr = int32_indices("indptr", indptr, device)
    last_page_len = int32_indices("last_page_len", last_page_len, device)
    if indptr.dim() == last_page_len.dim() == 1 and indptr.shape[0] == last_page_len.shape[0] + 1:
        starts = indptr.cpu().numpy()
        # What lies before and beyond is anything at all: a batch may be cut out of a larger one.
        first = max(0, int(starts[0]))
        if first or indices.dtype != torch.int32:
            indices = indices[first : max(first, int(starts[-1]))]
            indptr = indptr - first if first else indptr
        empty = starts[1:] == starts[:-1]
        if empty.any():
            last_page_len = last_page_len.masked_fill(torch.from_numpy(empty).to(last_page_len.device), 0)
    indices = int32_indices("indices", indices, device)
    return PageTable(indptr, indices, last_page_len, page_size=page_size)


def page_table_of_lengths(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    kv_lens: torch.Tensor,
    page_size: int,
    device: torch.device | None = None,
) -> PageTable:
    """From CSR arrays with the tokens of each sequence; pages that a sequence does not fill yet are dropped.

    Shapes: indptr [B + 1]; indices [>= indptr[-1]]; kv_lens [B]; int32 or int64, on any device.
    Raises: ValueError for a sequence with more tokens than its pages hold, see PageTable for the rest.
    """
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1, got {page_size}.")
    device = indices.device if device is None else device
    starts = int32_indices("kv_indptr", indptr).cpu().numpy().astype(np.int64)
    ids = indices.cpu().numpy()
    lens = int32_indices("kv_len_arr", kv_lens).cpu().numpy().astype(np.int64)
    if starts.ndim != 1 or lens.ndim != 1 or starts.shape[0] != lens.shape[0] + 1:
        raise ValueError(
            f"kv_indptr must have shape [B + 1] with B = {lens.shape[0] if lens.ndim else 0} (set by kv_len_arr), "
            f"got {list(starts.shape)}."
        )
    held, needed = starts[1:] - starts[:-1], -(-lens // page_size)
    short = (lens < 0) | (needed > held)
    if short.any():
        row = int(short.argmax())
        raise ValueError(
            f"kv_len_arr of sequence {row} must be between 0 and {int(held[row]) * page_size} (its pages), "
            f"got {int(lens[row])}."
        )
    if int(starts[-1]) > ids.shape[0]:
        raise ValueError(f"kv_indices must hold kv_indptr[-1] = {int(starts[-1])} entries, got {ids.shape[0]}.")
    if not starts[0] and (needed == held).all():
        ids = ids[: int(starts[-1])]
    else:
        ids = np.concatenate([ids[start : start + count] for start, count in zip(starts, needed, strict=False)])
        starts = np.concatenate([[0], needed.cumsum()])
    last = np.where(needed > 0, lens - (needed - 1) * page_size, 0)
    # Ids that no sequence uses may be anything.
    used = int32_indices("kv_indices", torch.from_numpy(ids))
    starts32, last32 = (torch.from_numpy(array.astype(np.int32)) for array in (starts, last))
    return PageTable(*(array.to(device) for array in (starts32, used, last32)), page_size=page_size)


def ragged_table(kv_indptr: torch.Tensor, device: torch.device | None = None) -> PageTable:
    """Keys packed one sequence after the other, seen as pages: the longest pages that no sequence ends within.

    Shapes: kv_indptr [B + 1] int32 or int64.
    """
    starts = int32_indices("kv_indptr", kv_indptr).cpu().numpy().astype(np.int64)
    if starts.ndim != 1 or not starts.shape[0] or starts[0] != 0:
        raise ValueError(f"kv_indptr must have shape [B + 1] and start with 0, got {list(kv_indptr.shape)}.")
    page_size = int(np.gcd.reduce(starts)) or 1
    indptr = starts // page_size
    arrays = (indptr, np.arange(max(indptr[-1], 0)), np.where(indptr[1:] > indptr[:-1], page_size, 0))
    device = kv_indptr.device if device is None else device
    return PageTable(*(torch.from_numpy(a.astype(np.int32)).to(device) for a in arrays), page_size=page_size)


def ragged_pages(name: str, packed: torch.Tensor, plan: AttentionPlan, kv_layout: str) -> torch.Tensor:
    """A packed [L, Hk, D] ("HND": [Hk, L, D]) as the pages [N, P, Hk, D] of a plan of `ragged_table`, without a copy.

    Raises: ValueError for another number of dims, other heads, or fewer rows than kv_indptr[-1].
    """
    num_pages, page_size = plan.page_indices.shape[0], plan.page_size
    num_rows = num_pages * page_size
    by_row = packed.transpose(0, 1) if kv_layout == "HND" and packed.dim() == 3 else packed
    if by_row.dim() != 3 or by_row.shape[0] < num_rows or by_row.shape[1] != plan.num_kv_heads:
        rows, heads = f"kv_indptr[-1] = {num_rows}", f"Hk = {plan.num_kv_heads}"
        shape = f"[{rows}, {heads}, D]" if kv_layout == "NHD" else f"[{heads}, {rows}, D]"
        raise ValueError(f"{name} must have shape {shape} in layout {kv_layout}, got {list(packed.shape)}.")
    return by_row[:num_rows].view(num_pages, page_size, *by_row.shape[1:])


def row_indptr(num_seqs: int, rows_a_seq: int, device: torch.device) -> torch.Tensor:
    """[B + 1] int32 of equal steps."""
    return torch.arange(0, num_seqs * rows_a_seq + 1, rows_a_seq, dtype=torch.int32, device=device)
