"""Page tables from block tables and lengths as the operator library's attention gets them: checked, then compact."""

from __future__ import annotations

import torch

from ...storage import PageTable

__all__ = ["page_table_of", "query_indptr_of"]


def page_table_of(block_tables: torch.Tensor, seq_lens: torch.Tensor, *, block_size: int, num_blocks: int) -> PageTable:
    """The blocks in use, row by row; entries beyond a length may be anything.

    Shapes: block_tables [S, M] and seq_lens [S], of any strides.
    Raises: ValueError for a length that is negative or beyond M blocks, and for a block that is not of the caches.
    """
    rows, lens = block_tables.to(torch.int64), seq_lens.to(torch.int64)
    capacity = rows.shape[1] * block_size
    is_bad = (lens < 0) | (lens > capacity)
    if bool(is_bad.any()):
        row = int(is_bad.int().argmax())
        raise ValueError(
            f"seq_lens of sequence {row} must be in 0..{capacity} (M = {rows.shape[1]} blocks of {block_size}), "
            f"got {int(lens[row])}."
        )
    num_needed = (lens + block_size - 1) // block_size
    is_used = torch.arange(rows.shape[1], device=rows.device) < num_needed[:, None]
    is_bad = is_used & ((rows < 0) | (rows >= num_blocks))
    if bool(is_bad.any()):
        row, column = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"block_tables of sequence {row} must name blocks in [0, {num_blocks}), got {int(rows[row, column])} "
            f"at column {column}."
        )
    last = (lens - (num_needed - 1) * block_size).masked_fill(num_needed == 0, 0)
    indptr = torch.cat([num_needed.new_zeros(1), num_needed.cumsum(0)])
    return PageTable(*(part.to(torch.int32) for part in (indptr, rows[is_used], last)), page_size=block_size)


def query_indptr_of(cum_seq_lens: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """cum_seq_lens [S + 1] as int32; each sequence has at least as many keys as rows, or no keys at all.

    Raises: ValueError where it does not divide num_tokens rows among the sequences, or rows exceed keys.
    """
    starts = cum_seq_lens.to(torch.int64)
    q_lens = starts.diff()
    if int(starts[0]) != 0 or int(starts[-1]) != num_tokens or bool((q_lens < 0).any()):
        raise ValueError(
            f"cum_seq_lens_q must start with 0, not decrease and end with {num_tokens} (rows of q), "
            f"got {starts[:8].tolist()}."
        )
    lens = seq_lens.to(torch.int64)
    is_bad = (lens > 0) & (lens < q_lens)
    if bool(is_bad.any()):
        row = int(is_bad.int().argmax())
        raise ValueError(
            f"seq_lens of sequence {row} must be at least {int(q_lens[row])} (its rows of q), got {int(lens[row])}. "
            "It counts all keys, those of the new tokens included."
        )
    return starts.to(torch.int32)
