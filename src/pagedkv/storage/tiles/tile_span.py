"""Where new tokens of beams go: which tiles they touch, and which slots they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.pages import check_no_grad
from ...shapes import Shapes, check_device, check_dtype, check_floating, check_last_dim_contiguous
from .tile_geometry import TileGeometry
from .tile_page_table import Entries, Indices, TilePageTable, check_index, check_indices

__all__ = ["TileSpan", "beam_indices", "check_span", "parent_indices", "touched_tiles"]


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
    first: Indices = first_tokens.cpu().numpy()
    last = max_tokens - shapes["n"]
    if first.size and not (first.min() >= 0 and first.max() <= last):
        row = int(((first < 0) | (first > last)).argmax())
        raise ValueError(
            f"first_tokens must leave room for {shapes['n']} tokens among the {max_tokens} of a beam, "
            f"got {first[row]} for row {row}."
        )
    return first


def touched_tiles(span: TileSpan) -> tuple[Indices, Indices]:
    """Each tile that a span touches, once: beams [m] and tiles [m]; n is at least 1."""
    first = span.first_tokens // span.tile_size
    if span.num_tokens == 1:
        return span.beams, first
    last = (span.first_tokens + span.num_tokens - 1) // span.tile_size
    counts = last - first + 1
    starts = np.cumsum(counts) - counts
    tiles = np.arange(counts.sum()) - np.repeat(starts - first, counts)
    return np.repeat(span.beams, counts), tiles


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
    beams: Indices = beam_ids.cpu().numpy()
    check_indices("beam_ids", beams, num_beams)
    return beams


def parent_indices(parents: Sequence[int] | torch.Tensor, num_beams: int) -> Indices:
    """Which beam each of all beams comes from, as an array; a tensor is int64."""
    if isinstance(parents, torch.Tensor):
        check_dtype("parents", parents, torch.int64)
        rows: Indices = parents.cpu().numpy()
    else:
        for beam, parent in enumerate(parents):
            check_index(f"parents[{beam}]", parent, num_beams)
        rows = np.array(parents, np.int64)
    if rows.shape != (num_beams,):
        raise ValueError(f"parents must name one beam for each of {num_beams}, got shape {list(rows.shape)}.")
    check_indices("parents", rows, num_beams)
    return rows
