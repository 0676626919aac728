"""What is done about a call that an interrupt ended somewhere in its midst: the books are made anew.

Kept are the sequences, each with the tokens and the pages that its row names; they are what users hold. The prefix
caches are emptied, since a cache and the locks on it may disagree: what live sequences hold is published again as they
grow, pins are left with nothing, and all other pages are free.

A sequence whose close was under way is closed. One that was about to give up or to get its pages is dropped, or still
swapped out: `swap_in` brings it back.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .allocator import PageArray
from .sequence_rows import SequenceRows

if TYPE_CHECKING:
    from .ledger import PageLedger
    from .page_budget import PageBudget
    from .sequence import Sequence

__all__ = ["Salvage", "settle"]


class Salvage(NamedTuple):
    """What counts of one live sequence: copies."""

    ledger: PageLedger
    seq: Sequence
    tokens: npt.NDArray[Any]
    pages: PageArray
    num_tokens: int
    is_new: bool


def settle(budget: PageBudget) -> None:
    """Makes all books of `budget` agree again; begins anew when it is interrupted itself. The caller holds the lock."""
    if budget.salvage is None:
        budget.salvage = [
            _read(ledger, seq) for ledger in budget.ledgers for seq in ledger.live.values() if not seq._is_closing
        ]
    for cache in budget.caches:
        cache.reset(force=True)
    for ledger in budget.ledgers:
        for seq in [seq for seq in ledger.live.values() if seq._is_closing]:
            _forget_copy(seq)
            del ledger.live[id(seq)]
            seq._state, seq._row, seq._handle = "closed", -1, None
        for pin in ledger.pins.values():
            pin._forget()
        # In place, because all sequences and the planner share them; one step.
        vars(ledger.rows).update(vars(SequenceRows()))
    for one in budget.salvage:
        _write(one)
    budget.copy_sources = Counter(src for src, _ in budget.pending_copies)
    budget.allocator.restore(_owner_counts(budget))
    for ledger in budget.ledgers:
        if ledger.planner is not None:
            ledger.planner.forget()
    budget.salvage = None
    budget.is_torn = False


def _read(ledger: PageLedger, seq: Sequence) -> Salvage:
    rows, row = ledger.rows, seq._row
    num_tokens = rows.num_tokens.item(row)
    num_pages = -(-num_tokens // ledger.page_size)
    # What is away has all its ids, whatever was counted while it was about to come back.
    tokens = rows.tokens.view(row)[: num_tokens if seq._state == "on pages" else None].copy()
    pages = rows.pages.view(row)[:num_pages].copy()
    return Salvage(ledger, seq, tokens, pages, num_tokens, bool(rows.is_new[row]))


def _write(one: Salvage) -> None:
    """Puts a sequence into fresh books, with nothing that it locks or has published."""
    ledger, seq, tokens, pages, num_tokens, is_new = one
    rows, has_all_pages = ledger.rows, pages.shape[0] == -(-num_tokens // ledger.page_size)
    if seq._state == "on pages" and not has_all_pages:
        seq._state = "dropped" if seq._ticket is None else "swapped out"
    if seq._state != "on pages":
        pages = pages[:0]
    else:
        _forget_copy(seq)
        if seq._window is not None:
            pages[: max(0, tokens.shape[0] - seq._window + 1) // ledger.page_size] = -1
    row = seq._row = rows.add(tokens, pages)
    rows.num_tokens[row] = tokens.shape[0] if seq._state == "dropped" else num_tokens
    rows.window[row] = seq._window or 0
    rows.first_page[row] = np.count_nonzero(pages < 0)
    rows.is_new[row] = is_new
    seq._num_cached_tokens = min(seq._num_cached_tokens, tokens.shape[0])
    seq._set_handle(None)


def _forget_copy(seq: Sequence) -> None:
    with suppress(Exception):  # the tier may have forgotten it already
        seq._drop_ticket()
    seq._ticket = None


def _owner_counts(budget: PageBudget) -> npt.NDArray[np.int32]:
    """How many owners each page has by the books of the sequences, when nothing is cached."""
    counts = np.zeros(budget.allocator.num_pages, np.int32)
    counts[: budget.allocator.num_reserved] = 1
    for ledger in budget.ledgers:
        counts += ledger.num_named()
    for src, times in budget.copy_sources.items():
        counts[src] += times
    return counts
