"""The rules that the names of a tile file keep, whoever wrote it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .tile_key import MAX_INDEX, PARTS
from .tile_record import HOST

__all__ = ["name_text", "names_defect"]

_FIELDS = ("sequence", "head", "tile")
_BOTH = len(PARTS)


def names_defect(kind: str, names: npt.NDArray[np.int64], named: npt.NDArray[np.int64], num_stored: int) -> str | None:
    """The first broken rule and who breaks it, or None.

    Rules: three indices from 0 to 2^31 - 1 and a part of the kind; no name twice; `named` from 0 to num_stored - 1;
           every stored tile named; all names of one tile alike but for the sequence, for only forks share tiles.
    """
    for column, field in enumerate(_FIELDS):
        row = _first((names[:, column] < 0) | (names[:, column] > MAX_INDEX))
        if row is not None:
            return f"{field} of name {row} must be from 0 to {MAX_INDEX}, got {names[row, column]}"
    parts = range(_BOTH) if kind == HOST else range(_BOTH, _BOTH + 1)
    row = _first((names[:, 3] < parts.start) | (names[:, 3] >= parts.stop))
    if row is not None:
        return (
            f"part of name {row} must be {' or '.join(map(str, parts))} in a file of kind {kind}, got {names[row, 3]}"
        )
    row = _first((named < 0) | (named >= num_stored))
    if row is not None:
        return f"name {row} must name one of {num_stored} stored tiles, got {named[row]}"
    return _repeated(names) or _unshared(names, named, num_stored)


def name_text(row: npt.NDArray[np.int64]) -> str:
    """A row of `names` in words."""
    sequence, head, tile, part = row.tolist()
    return f"sequence {sequence}, head {head}, tile {tile}, part {(*PARTS, 'k and v')[part]}"


def _repeated(names: npt.NDArray[np.int64]) -> str | None:
    # Two int64 hold a name, 31 bits an index: sorted by both, equal names are neighbours.
    high, low = names[:, 0] << 31 | names[:, 1], names[:, 2] << 2 | names[:, 3]
    order = np.lexsort((low, high))
    high, low = high[order], low[order]
    row = _first((high[1:] == high[:-1]) & (low[1:] == low[:-1]))
    return None if row is None else f"names must be distinct, got {name_text(names[order[row]])} twice"


def _unshared(names: npt.NDArray[np.int64], named: npt.NDArray[np.int64], num_stored: int) -> str | None:
    # A tile has at least one name; without this a file of few names could say that it stores any number of tiles.
    if num_stored > len(names):
        return f"every stored tile must be named, got {len(names)} names of {num_stored}"
    some_name = np.full(num_stored, -1, dtype=np.int64)
    some_name[named] = np.arange(len(names))
    tile = _first(some_name < 0)
    if tile is not None:
        return f"every stored tile must be named, got none for tile {tile}"
    row = _first((names[:, 1:] != names[some_name[named], 1:]).any(axis=1))
    if row is None:
        return None
    other = name_text(names[some_name[named[row]]])
    return f"names of one stored tile must differ in the sequence alone, got {name_text(names[row])} and {other}"


def _first(broken: npt.NDArray[np.bool_]) -> int | None:
    return int(broken.argmax()) if broken.any() else None
