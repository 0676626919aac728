"""How a batch is cut into the programs of a GPU: tiles of query rows, and for each the keys of one program.

Rows: query head h of token t belongs to KV head h // group; for one KV head, row r of a sequence is head r % group of
its group for token r // group. One program takes a tile of neighbouring rows, so all heads of a group read a key once.
Keys: a tile whose keys are too many for one program is cut into chunks; each leaves its result and LSE as partial rows
that are merged in the order of the chunks.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..attention_plan import AttentionPlan, DeviceWork, PlanSettings
from ..upload import uploaded_together
from .runtime import num_multiprocessors

__all__ = ["HostWork", "divide_attention", "divide_batch", "tile_heights", "uploaded_work", "work_of"]

# A chunk is no shorter than this, and chunks are cut at multiples of it.
_CHUNK = 256
# Programs a multiprocessor that keep it busy to the end, for each height of tiles.
_PROGRAMS_EACH = (8, 4, 2)

_Ints = npt.NDArray[np.int32]


class HostWork(NamedTuple):
    """Items and merges as numpy arrays; shapes as of `DeviceWork`."""

    items: tuple[_Ints, _Ints, _Ints]
    merges: _Ints
    num_partial_rows: int


def tile_heights(head_dim: int) -> tuple[int, int, int]:
    """Rows of a tile, for few, some and many rows of one sequence: what registers and shared memory hold."""
    return (16, 64, 128) if head_dim <= 128 else (16, 64, 64)


def divide_batch(
    settings: PlanSettings, query_lens: npt.NDArray[Any], seq_lens: npt.NDArray[Any], device: torch.device
) -> HostWork:
    """As plans of these settings have a batch cut for a device."""
    return divide_attention(
        query_lens,
        seq_lens,
        group=settings.group,
        num_kv_heads=settings.num_kv_heads,
        head_dim=max(settings.head_dim, settings.value_dim),
        causal=settings.causal,
        window_left=settings.window_left,
        num_multiprocessors=num_multiprocessors(device),
    )


def divide_attention(
    query_lens: npt.NDArray[Any],
    seq_lens: npt.NDArray[Any],
    *,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    causal: bool,
    window_left: int,
    num_multiprocessors: int,
) -> HostWork:
    """Cuts a batch of S sequences: query_lens, seq_lens [S].

    Rule: a sequence goes to the lowest tiles that hold all its rows, or to the highest; in each kind the dearest first.
    """
    first_tokens = np.cumsum(query_lens, dtype=np.int64) - query_lens
    heights = tile_heights(head_dim)
    num_rows = query_lens.astype(np.int64) * group
    kinds = np.searchsorted(heights[:2], num_rows)
    items: list[_Ints] = []
    merges: list[_Ints] = [np.empty((0, 5), np.int32)]
    num_partial_rows = 0
    for kind, height in enumerate(heights):
        seqs = np.flatnonzero((kinds == kind) & (num_rows > 0))
        num_tiles = -(-num_rows[seqs] // height)
        seq = np.repeat(seqs, num_tiles)
        first_row = _counts_up(num_tiles) * height
        rows = np.minimum(num_rows[seq] - first_row, height)
        # The positions of the first and the last token of each tile.
        start = seq_lens[seq].astype(np.int64) - query_lens[seq]
        first, last = start + first_row // group, start + (first_row + rows - 1) // group
        key_start = np.maximum(first - window_left, 0) if window_left >= 0 else np.zeros_like(first)
        key_start -= key_start % _CHUNK
        key_stop = np.clip(last + 1, 0, seq_lens[seq]) if causal else seq_lens[seq].astype(np.int64)
        spans = np.maximum(key_stop - key_start, 0)
        programs = num_multiprocessors * _PROGRAMS_EACH[kind]
        chunk = -(-int(spans.sum()) * num_kv_heads // programs)
        chunk = max(-(-chunk // _CHUNK), 1) * _CHUNK
        num_chunks = np.maximum(-(-spans // chunk), 1)
        is_cut = num_chunks > 1
        partial = np.cumsum(np.where(is_cut, num_chunks * rows, 0)) + num_partial_rows
        first_partial = partial - np.where(is_cut, num_chunks * rows, 0)
        num_partial_rows = int(partial[-1]) if partial.size else num_partial_rows
        tile = np.repeat(np.arange(seq.shape[0]), num_chunks)
        number = _counts_up(num_chunks)
        chunk_start = key_start[tile] + number * chunk
        chunk_stop = np.minimum(chunk_start + chunk, np.maximum(key_stop, key_start)[tile])
        slot = np.where(is_cut[tile], first_partial[tile] + number * rows[tile], -1)
        table = np.stack([seq[tile], first_row[tile], chunk_start, chunk_stop, slot], axis=1).astype(np.int32)
        items.append(table[np.argsort(chunk_start - chunk_stop, kind="stable")])
        cut = np.flatnonzero(is_cut)
        cut_rows = rows[cut]
        of = np.repeat(cut, cut_rows)
        within = _counts_up(cut_rows)
        row = first_row[of] + within
        merged = [
            first_tokens[seq[of]] + row // group,
            row % group,
            first_partial[of] + within,
            rows[of],
            num_chunks[of],
        ]
        merges.append(np.stack(merged, axis=1).astype(np.int32))
    return HostWork((items[0], items[1], items[2]), np.concatenate(merges), num_partial_rows)


def uploaded_work(work: HostWork, device: torch.device) -> DeviceWork:
    """The work on its device, by one copy that is not waited for."""
    return DeviceWork.of(uploaded_together([*work.items, work.merges], device), work.num_partial_rows)


_made: weakref.WeakKeyDictionary[AttentionPlan, DeviceWork] = weakref.WeakKeyDictionary()


def work_of(plan: AttentionPlan) -> DeviceWork:
    """The plan's own, or, for one that was made without, the same made once at its first run, which waits for it."""
    work = plan.device_work
    if work is None:
        work = _made.get(plan)
    if work is None:
        device = plan.query_indptr.device
        query_lens = np.diff(plan.query_indptr.cpu().numpy())
        host = divide_batch(plan.settings, query_lens, plan.seq_lens.cpu().numpy(), device)
        work = _made[plan] = uploaded_work(host, device)
    return work


def _counts_up(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """0, 1, ..., counts[0] - 1, then 0, 1, ..., counts[1] - 1, and so on."""
    stops = np.cumsum(counts)
    total = int(stops[-1]) if stops.size else 0
    counted: npt.NDArray[np.int64] = np.arange(total) - np.repeat(stops - counts, counts)
    return counted
