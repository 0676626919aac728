"""How large the work of any batch within limits can get: for memory that is taken before the batches are known."""

from __future__ import annotations

from typing import NamedTuple

from .attention_work import _CHUNK, _PROGRAMS_EACH, tile_heights

__all__ = ["WorkCapacity", "work_capacity"]


class WorkCapacity(NamedTuple):
    """The most items of each height of tiles, merges and partial rows that `divide_attention` makes of such a batch."""

    items: tuple[int, int, int]
    merges: int
    num_partial_rows: int


def work_capacity(
    *,
    max_num_seqs: int,
    max_num_tokens: int,
    max_query_len: int,
    max_seq_len: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    num_multiprocessors: int,
) -> WorkCapacity:
    """From the rules of the cut.

    A chunk is at least 1 / (programs / Hk) of the keys of all tiles of its height, so that cutting adds no more than
    programs / Hk items; and no tile becomes more chunks than its keys have room for.
    """
    low, middle, high = tile_heights(head_dim)
    max_query_len = min(max_query_len, max_num_tokens)
    items: list[int] = []
    num_merges = num_partial_rows = 0
    # Rows of a sequence in each kind: above the first number, up to the second.
    for kind, (above, rows, height) in enumerate(((0, low, low), (low, middle, middle), (middle, 2**62, high))):
        fewest, most = above // group + 1, min(rows // group, max_query_len)
        num_seqs = min(max_num_seqs, max_num_tokens // fewest) if fewest <= most else 0
        num_tiles = num_seqs
        if kind == 2 and num_seqs:
            num_tiles += max_num_tokens * group // height
        most_chunks = -(-max_seq_len // _CHUNK)
        num_added = min(num_multiprocessors * _PROGRAMS_EACH[kind] // num_kv_heads, num_tiles * max(most_chunks - 1, 0))
        num_cut = min(num_added, num_tiles)
        tile_rows = min(height, most * group)
        items.append(num_tiles + num_added)
        num_merges += num_cut * tile_rows
        num_partial_rows += (num_cut + num_added) * tile_rows
    return WorkCapacity((items[0], items[1], items[2]), min(num_merges, max_num_tokens * group), num_partial_rows)
