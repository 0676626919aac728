"""Where new tokens of beams go: which tiles they touch, and which slots they take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.pages import check_memory, check_no_grad
from ...shapes import Shapes, check_device, check_dtype, check_floating, check_last_dim_contiguous
from .tile_geometry import TileGeometry
from .tile_page_table import Entries, Indices, TilePageTable, check_index, check_indices, copied_indices

__all__ = [
    "Flags",
    "TileSpan",
    "TouchedTiles",
    "asked_tiles",
    "beam_indices",
    "check_span",
    "parent_indices",
    "touched_tiles",
]

Flags = npt.NDArray[np.bool_]


class TileSpan(NamedTuple):
    """n tokens of each of R beams: `beams` [R], no beam twice, and the position of the first token of each, [R]."""

    beams: Indices
    first_tokens: Indices
    num_tokens: int
    tile_size: int

    def slots(self, entries: Entries) -> Indices:
        """The slot of each token of each head, [R * H * n], once all the tiles have pages in `entries` [B, H, T]."""
        positions = self.first_tokens[:, None] + np.arange(self.num_tokens)
        tiles, offsets = np.divmod(positions, self.tile_size)
        # Indices around a slice put their own axes first: [R, n, H].
        pages = entries[self.beams[:, None], :, tiles].astype(np.int64)
        slots = pages * self.tile_size + offsets[:, :, None]
        return slots.transpose(0, 2, 1).reshape(-1)


def check_span(
    geometry: TileGeometry,
    table: TilePageTable,
    device: torch.device,
    key: torch.Tensor,
    value: torch.Tensor,
    first_tokens: torch.Tensor,
    beam_ids: torch.Tensor | None,
) -> TileSpan:
    """The span of new tokens, after everything that could stop them from being stored was refused."""
    shapes = Shapes()
    for symbol, count in (("H", table.num_heads), ("D", geometry.head_dim), ("Dv", geometry.value_dim)):
        shapes.bind(symbol, count, "the cache")
    if beam_ids is None:
        shapes.bind("R", table.num_beams, "the cache")
    for name, tensor, pattern in (("key", key, "R H n D"), ("value", value, "R H n Dv")):
        shapes.check(name, tensor, pattern)
        if geometry.has_scales:
            check_floating(name, tensor)
        else:
            check_dtype(name, tensor, geometry.dtype)
        check_device(name, tensor, device, "the cache")
        check_last_dim_contiguous(name, tensor)
    check_no_grad(key=key, value=value)
    check_memory(key=key, value=value)
    beams = beam_indices(shapes, beam_ids, table.num_beams, device, "R")
    if beam_ids is not None and np.unique(beams).size != beams.size:
        raise ValueError(f"beam_ids must name no beam twice, got {beams.tolist()}.")
    first = _first_tokens(shapes, first_tokens, table.num_tiles * geometry.tile_size, device)
    return TileSpan(beams, first, shapes["n"], geometry.tile_size)


def _first_tokens(shapes: Shapes, first_tokens: torch.Tensor, max_tokens: int, device: torch.device) -> Indices:
    shapes.check("first_tokens", first_tokens, "R")
    check_dtype("first_tokens", first_tokens, torch.int64)
    if not first_tokens.is_cpu:
        check_device("first_tokens", first_tokens, device, "the cache")
    first = copied_indices(first_tokens)
    last = max_tokens - shapes["n"]
    if first.size and not (first.min() >= 0 and first.max() <= last):
        row = int(((first < 0) | (first > last)).argmax())
        raise ValueError(
            f"first_tokens must leave room for {shapes['n']} tokens among the {max_tokens} of a beam, "
            f"got {first[row]} for row {row}."
        )
    return first


class TouchedTiles(NamedTuple):
    """Tiles, each once: beams [m], tiles [m], and [m] whether all tokens of it are meant."""

    beams: Indices
    tiles: Indices
    is_whole: Flags


def touched_tiles(span: TileSpan) -> TouchedTiles:
    """Each tile that a span touches; n is at least 1."""
    size, stop = span.tile_size, span.first_tokens + span.num_tokens
    first = span.first_tokens // size
    if span.num_tokens == 1:
        return TouchedTiles(span.beams, first, np.full(first.shape, size == 1))
    counts = (stop - 1) // size - first + 1
    starts = np.cumsum(counts) - counts
    tiles = np.arange(counts.sum()) - np.repeat(starts - first, counts)
    is_whole = (tiles * size >= np.repeat(span.first_tokens, counts)) & ((tiles + 1) * size <= np.repeat(stop, counts))
    return TouchedTiles(np.repeat(span.beams, counts), tiles, is_whole)


def beam_indices(
    shapes: Shapes, beam_ids: torch.Tensor | None, num_beams: int, device: torch.device, symbol: str
) -> Indices:
    """Beam ids as an array on the host; all beams in order for None. They are on the CPU or on the cache's device."""
    if beam_ids is None:
        return np.arange(num_beams)
    shapes.check("beam_ids", beam_ids, symbol)
    check_dtype("beam_ids", beam_ids, torch.int64)
    if not beam_ids.is_cpu:
        check_device("beam_ids", beam_ids, device, "the cache")
    beams = copied_indices(beam_ids)
    check_indices("beam_ids", beams, num_beams)
    return beams


def asked_tiles(
    num_tiles: int | torch.Tensor, num_rows: int, most: int, device: torch.device
) -> tuple[int, Flags | None]:
    """How many tiles R rows ask for at most, and [R, 1, that many] which ones each does; None where all do alike."""
    if not isinstance(num_tiles, torch.Tensor):
        check_index("num_tiles", num_tiles, most + 1)
        return num_tiles, None
    Shapes(R=num_rows).check("num_tiles", num_tiles, "R")
    check_dtype("num_tiles", num_tiles, torch.int64)
    if not num_tiles.is_cpu:
        check_device("num_tiles", num_tiles, device, "the cache")
    counts = copied_indices(num_tiles)
    check_indices("num_tiles", counts, most + 1)
    longest = int(counts.max(initial=0))
    if not counts.size or int(counts.min()) == longest:
        return longest, None
    return longest, np.arange(longest) < counts[:, None, None]


def parent_indices(parents: Iterable[int] | torch.Tensor, num_beams: int) -> Indices:
    """Which beam each of all beams comes from, as an array; a tensor is int64."""
    if isinstance(parents, torch.Tensor):
        shapes = Shapes()
        shapes.bind("B", num_beams, "the cache")
        shapes.check("parents", parents, "B")
        check_dtype("parents", parents, torch.int64)
        rows = copied_indices(parents)
    else:
        if not isinstance(parents, Iterable):
            raise TypeError(f"parents must be an int64 tensor or ints, one a beam, got {type(parents).__name__}.")
        given = [int(parent) if isinstance(parent, np.integer) else parent for parent in parents]
        for beam, parent in enumerate(given):
            check_index(f"parents[{beam}]", parent, num_beams)
        rows = np.array(given, np.int64)
    if rows.shape != (num_beams,):
        raise ValueError(f"parents must name one beam for each of {num_beams}, got shape {list(rows.shape)}.")
    check_indices("parents", rows, num_beams)
    return rows
