"""Which tiles of a cache the sequences of a call read, and the page table and mask that show them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..kernels.quantize import QuantizedKV
from ..kernels.upload import uploaded
from ..storage.page_table import PageTable
from ..storage.tiles.host_tile_cache import HostTileCache
from ..storage.tiles.tile_cache import TileCache
from ..storage.tiles.tile_key import PARTS, TileKey
from ..storage.tiles.tile_page_table import Indices
from .tile_rows import TileRows

__all__ = ["HeldTiles", "TileLayout", "TilePages", "lay_out", "readable_pages"]

Mask = npt.NDArray[np.bool_]


class HeldTiles(NamedTuple):
    """The tiles that are there, for each sequence (row, KV head) in order of their numbers.

    Shapes: counts [B * Hk]: how many of each sequence; tiles and pages [sum of counts], a tile's number and page.
    """

    counts: Indices
    tiles: Indices
    pages: Indices


class TilePages(NamedTuple):
    """Keys [N, P, D], values [N, P, Dv], the scales of int8, and which of the pages are read."""

    key: torch.Tensor
    value: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None
    held: HeldTiles


class TileLayout(NamedTuple):
    """A page table of the sequences; causal rule and window are in the mask where there is one."""

    table: PageTable
    mask: torch.Tensor | None


@contextmanager
def readable_pages(cache: TileCache | HostTileCache, rows: TileRows, skip: bool) -> Iterator[TilePages]:
    """The pages that rows read: pinned where they lie, or copies from RAM. Without `skip` none may be missing."""
    if isinstance(cache, HostTileCache):
        yield _copied_pages(cache, rows, skip)
        return
    beams, counts = torch.from_numpy(rows.beams), torch.from_numpy(rows.tile_counts)
    # In numpy: some tens of kilobytes are not worth waking torch's threads.
    with cache.pinned_entries(beams, counts) as pages:
        places = np.nonzero(pages >= 0)
        held = HeldTiles((pages >= 0).sum(axis=2).ravel(), places[2], pages[places].astype(np.int64))
        if not skip:
            _refuse_missing(rows, held)
        yield TilePages(cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales, held)


def lay_out(
    rows: TileRows, held: HeldTiles, device: torch.device, causal: bool, window_left: int, rope: bool
) -> TileLayout:
    """The table of the tiles that are there; with rope, which goes by the place in the table, of all, some masked."""
    size, num_heads = rows.tile_size, rows.num_kv_heads
    lengths, wanted = rows.seq_lens.repeat(num_heads), rows.tile_counts.repeat(num_heads)
    if np.array_equal(held.counts, wanted):
        return TileLayout(_table(held, lengths - (wanted - 1).clip(min=0) * size, size, device), None)
    is_there = np.ones(held.tiles.size, np.bool_)
    if rope:
        held, is_there = _with_places_for_all(held, wanted)
    # Only the last tile of a sequence can be of fewer tokens, where it is the one that seq_len ends in.
    stops = held.counts.cumsum()
    last_tiles = np.full(lengths.size, -1)
    last_tiles[held.counts > 0] = held.tiles[stops[held.counts > 0] - 1]
    last_page_len = np.where(last_tiles < 0, 0, (lengths - last_tiles * size).clip(max=size))
    mask = _mask(rows, held, is_there, lengths, causal, window_left)
    return TileLayout(_table(held, last_page_len, size, device), uploaded(mask, device))


def _table(held: HeldTiles, last_page_len: Indices, page_size: int, device: torch.device) -> PageTable:
    csr = np.concatenate([[0], held.counts.cumsum()]), held.pages, last_page_len
    return PageTable(*(torch.from_numpy(array.astype(np.int32)) for array in csr), page_size=page_size).to(device)


def _with_places_for_all(held: HeldTiles, wanted: Indices) -> tuple[HeldTiles, Mask]:
    """All tiles below the lengths of the sequences, and which of them are there; the others stand on page 0."""
    starts = wanted.cumsum() - wanted
    places = np.repeat(starts, held.counts) + held.tiles
    pages, is_there = np.zeros(wanted.sum(), np.int64), np.zeros(wanted.sum(), np.bool_)
    pages[places], is_there[places] = held.pages, True
    return HeldTiles(wanted, np.arange(pages.size) - np.repeat(starts, wanted), pages), is_there


def _mask(rows: TileRows, held: HeldTiles, is_there: Mask, lengths: Indices, causal: bool, window_left: int) -> Mask:
    """The custom mask, for each sequence [q_len, tokens in the table], from the positions that the tokens have."""
    q_len = rows.query.shape[1]
    sequences = np.repeat(np.arange(lengths.size), held.counts)
    positions = held.tiles[:, None] * rows.tile_size + np.arange(rows.tile_size)
    inside = positions < lengths[sequences][:, None]
    positions, shown = positions[inside], is_there.repeat(inside.sum(axis=1))
    sequences = sequences.repeat(inside.sum(axis=1))
    num_tokens = np.bincount(sequences, minlength=lengths.size)
    # Where the first row of each token's sequence has it in the mask; the next row is a sequence's tokens further.
    starts = num_tokens.cumsum() - num_tokens
    places = np.arange(positions.size) + (starts * (q_len - 1))[sequences]
    mask = np.empty(positions.size * q_len, np.bool_)
    for token in range(q_len):
        distances = (lengths - q_len + token)[sequences] - positions
        visible = shown & (distances >= 0) if causal else shown
        mask[places] = visible & (distances <= window_left) if window_left >= 0 else visible
        places += num_tokens[sequences]
    return mask


def _copied_pages(cache: HostTileCache, rows: TileRows, skip: bool) -> TilePages:
    """Copies of the tiles that the rows read, each once and all of one moment."""
    while True:
        places, held = _tiles_of_rows(cache, rows)
        if not skip:
            _refuse_missing(rows, held)
        try:
            tiles = cache.get_batch([TileKey(*place, part) for part in PARTS for place in places])
            break
        except KeyError:
            # Some are gone by now.
            continue
    values, scales = tiles if isinstance(tiles, QuantizedKV) else (tiles, None)
    if not places:  # one page for the table to name, which no row sees
        values = values.new_zeros(2, *values.shape[1:])
        scales = None if scales is None else scales.new_zeros(2, *scales.shape[1:])
    key_scales, value_scales = (None, None) if scales is None else scales[:, None].chunk(2)
    key, value = values.chunk(2)
    return TilePages(key, value, key_scales, value_scales, held)


def _tiles_of_rows(cache: HostTileCache, rows: TileRows) -> tuple[list[tuple[int, int, int]], HeldTiles]:
    """Which tiles that rows read have both keys and values: a list of them, whose places are the pages of the rows."""
    beams, row_of = np.unique(rows.beams, return_inverse=True)
    most = np.zeros(beams.size, np.int64)
    np.maximum.at(most, row_of, rows.tile_counts)
    places: list[tuple[int, int, int]] = []
    of_beams: list[tuple[Indices, int]] = []
    for beam, num_tiles in zip(beams.tolist(), most.tolist(), strict=True):
        found = _tiles_of_beam(cache, beam, rows.num_kv_heads, num_tiles)
        of_beams.append((np.array(found, np.int64).reshape(-1, 2), len(places)))
        places += [(beam, head, tile) for head, tile in found]
    counts, tiles, pages = [], [], []
    for num_tiles, beam_row in zip(rows.tile_counts.tolist(), row_of.tolist(), strict=True):
        found_tiles, first_page = of_beams[beam_row]
        read = np.flatnonzero(found_tiles[:, 1] < num_tiles)
        counts.append(np.bincount(found_tiles[read, 0], minlength=rows.num_kv_heads))
        tiles.append(found_tiles[read, 1])
        pages.append(first_page + read)
    none = np.empty(0, np.int64)
    return places, HeldTiles(*(np.concatenate([none, *parts]) for parts in (counts, tiles, pages)))


def _tiles_of_beam(cache: HostTileCache, beam: int, num_heads: int, num_tiles: int) -> list[tuple[int, int]]:
    """(head, tile) of the tiles below `num_tiles` with keys and values, in order."""
    parts: dict[tuple[int, int], int] = {}
    for _, head, tile, _ in cache.keys_of(beam):
        if head < num_heads and tile < num_tiles:
            parts[head, tile] = parts.get((head, tile), 0) + 1
    return sorted(place for place, count in parts.items() if count == len(PARTS))


def _refuse_missing(rows: TileRows, held: HeldTiles) -> None:
    wanted = rows.tile_counts.repeat(rows.num_kv_heads)
    short = np.flatnonzero(held.counts < wanted)
    if not short.size:
        return
    sequence = int(short[0])
    start = int(held.counts[:sequence].sum())
    tiles = held.tiles[start : start + held.counts[sequence]]
    tile = int((tiles == np.arange(tiles.size)).sum())
    row, head = divmod(sequence, rows.num_kv_heads)
    raise ValueError(
        f"cache must hold the {rows.seq_lens[row]} tokens that row {row} reads, got no tile for beam "
        f"{rows.beams[row]}, head {head}, tile {tile}. Store it, or pass missing='skip' to leave its tokens out."
    )
