"""Who holds pages of a tile cache: by name until an unpin, or for as long as a block runs."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .tile_page_table import Indices, PageIds

__all__ = ["NOBODY", "SEVERAL", "Held", "PinnedBlock", "TilePins"]

# In the place of a beam: no pin at all, and pins for more than one beam.
NOBODY, SEVERAL = -1, -2


class Held(NamedTuple):
    """One pin on each of n pages, no page twice, and the beam that each is held for, or SEVERAL."""

    pages: Indices
    beams: Indices
    writes: bool

    @classmethod
    def one(cls, page: int, beam: int, *, writes: bool) -> Held:
        """A pin on one page."""
        return cls(np.array([page]), np.array([beam]), writes)

    @classmethod
    def read(cls, pages: PageIds, beams: Indices, num_pages: int) -> Held:
        """Pins on pages that beams[i] reads as pages[i]; equal pages get one pin.

        Marking them takes a twentieth of the time of np.unique for 4,096 pages.
        """
        readers = np.full(num_pages, NOBODY, np.int64)
        readers[pages] = beams
        is_others = readers[pages] != beams
        if is_others.any():
            readers[pages[is_others]] = SEVERAL
        held = np.flatnonzero(readers != NOBODY)
        return cls(held, readers[held], False)


class PinnedBlock:
    """What a block that holds pages keeps; when it is gone, for whatever reason, so are its pins."""

    __slots__ = ("__weakref__",)


class TilePins:
    """The record of all pins, from which their counts can be made at any time.

    by_tile: what `pin` and `get_for_write` hold, by the names they were called with; none of them is empty.
    ended:   blocks whose pins are to be taken off. Blocks come here also by their own end, at any moment and on any
             thread, the one that is inside of the cache included; so nothing else happens then.
    """

    def __init__(self) -> None:
        self.by_tile: dict[tuple[int, int, int], tuple[Held, ...]] = {}
        self.ended: deque[weakref.ref[PinnedBlock]] = deque()
        self._of_blocks: dict[weakref.ref[PinnedBlock], Held] = {}

    def __iter__(self) -> Iterator[Held]:
        for of_tile in self.by_tile.values():
            yield from of_tile
        yield from self._of_blocks.values()

    def open_block(self, held: Held) -> PinnedBlock:
        """Records pins for as long as the caller keeps the block."""
        block = PinnedBlock()
        self._of_blocks[weakref.ref(block, self.ended.append)] = held
        return block

    def end_block(self, block: PinnedBlock) -> None:
        """Has the pins of a block taken off with the next `forget_ended`."""
        reference = weakref.ref(block)
        # Kept in the reference, and only to be had while there is the block.
        hash(reference)
        self.ended.append(reference)

    def forget_ended(self) -> list[Held]:
        """Takes the blocks that ended from the record; what they held."""
        forgotten = []
        while self.ended:
            held = self._of_blocks.pop(self.ended[0], None)
            if held is not None:
                forgotten.append(held)
            # Last: an interrupt before leaves it here for the next time.
            self.ended.popleft()
        return forgotten
