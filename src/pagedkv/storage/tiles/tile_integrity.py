"""Proves that the books of a tile cache agree, from what its table and its pins say.

The sentences, in the order they are checked; an IntegrityError quotes the first that does not hold:

    every page is on the free list once, or is named or pinned, never both
    a page has as many names as beams have it in the table
    a page is of one head and tile
    a page has as many pins and writers as the record of pins says, and its holder is whom they are for
    a page that is written has one name at most
    no two pages were last used at the same time
    the table on the device is the table on the host
"""

from __future__ import annotations

import numpy as np

from ...errors import IntegrityError
from .tile_ledger import TileLedger
from .tile_page_table import Indices
from .tile_pins import NOBODY, SEVERAL

__all__ = ["check_tiles"]


def check_tiles(ledger: TileLedger) -> None:
    """Returns when every sentence above holds.

    Raises: IntegrityError that quotes the sentence and the evidence.
    """
    _check_free_list(ledger)
    _check_names(ledger)
    _check_pins(ledger)
    _check_use(ledger)
    device_table = ledger.table.device_table.cpu().numpy()
    different = np.argwhere(device_table != ledger.table.entries)
    evidence = f"they differ at {different[:1].tolist()}"
    _require(not different.size, "the table on the device is the table on the host", evidence)


def _require(holds: bool, sentence: str, evidence: str) -> None:
    if not holds:
        raise IntegrityError(f"broken: {sentence}: {evidence}.")


def _none(pages: Indices, sentence: str, evidence: str) -> None:
    if pages.size:
        _require(False, sentence, evidence.format(page=pages[0]))


def _check_free_list(ledger: TileLedger) -> None:
    sentence = "every page is on the free list once, or is named or pinned, never both"
    listed = np.bincount(np.array(ledger.free, np.int64), minlength=ledger.num_pages)
    held = (ledger.num_names > 0) | (ledger.num_pins > 0)
    _none(np.flatnonzero(listed > 1), sentence, "page {page} is on it more than once")
    _none(np.flatnonzero((listed > 0) & held), sentence, "page {page} is on it and is named or pinned")
    _none(np.flatnonzero((listed == 0) & ~held), sentence, "page {page} is neither")


def _check_names(ledger: TileLedger) -> None:
    entries, num_tiles = ledger.table.entries, ledger.table.num_tiles
    sentence = "a page has as many names as beams have it in the table"
    outside = entries[(entries < -1) | (entries >= ledger.num_pages)]
    _require(not outside.size, sentence, f"the table has {outside[:1].tolist()}, outside 0..{ledger.num_pages - 1}")
    wrong = np.flatnonzero(ledger.count_names(entries) != ledger.num_names)
    _none(wrong, sentence, "page {page} has another number")
    sentence = "a page is of one head and tile"
    _, heads, tiles = np.nonzero(entries >= 0)
    pages = entries[entries >= 0].astype(np.int64)
    strays = pages[ledger.tile_of[pages] != heads * num_tiles + tiles]
    _none(strays, sentence, "page {page} stands in the table under another one")
    _none(np.flatnonzero((ledger.tile_of < 0) & (ledger.num_pins > 0)), sentence, "page {page} is pinned and of none")
    _none(np.array(ledger.free, np.int64)[ledger.tile_of[ledger.free] >= 0], sentence, "page {page} is free and of one")


def _check_pins(ledger: TileLedger) -> None:
    sentence = "a page has as many pins and writers as the record of pins says, and its holder is whom they are for"
    pinned, written = np.zeros_like(ledger.num_pins), np.zeros_like(ledger.num_writers)
    for held in ledger.pins:
        pinned[held.pages] += 1
        written[held.pages] += held.writes
        holders = ledger.holder[held.pages]
        _none(held.pages[(holders != held.beams) & (holders != SEVERAL)], sentence, "page {page} has another holder")
    _none(np.flatnonzero(ledger.num_pins != pinned), sentence, "page {page} has another number of pins")
    _none(np.flatnonzero(ledger.num_writers != written), sentence, "page {page} has another number of writers")
    _none(np.flatnonzero((pinned == 0) & (ledger.holder != NOBODY)), sentence, "page {page} has a holder and no pin")
    sentence = "a page that is written has one name at most"
    _none(np.flatnonzero((ledger.num_writers > 0) & (ledger.num_names > 1)), sentence, "page {page} has more")


def _check_use(ledger: TileLedger) -> None:
    sentence = "no two pages were last used at the same time"
    pages = np.flatnonzero(ledger.num_names > 0)
    used = ledger.use.last_used[pages]
    _require(np.unique(used).size == used.size, sentence, f"the times of {pages.tolist()} are {used.tolist()}")
    _none(pages[used >= ledger.use.clock], sentence, "page {page} was used later than now")
