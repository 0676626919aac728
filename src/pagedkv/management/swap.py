"""Takes the pages of a sequence away and gives it others: its bytes wait in a tier, or are computed again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .allocator import PageArray
from .ledger import PageLedger
from .sequence import Sequence, SwapTier

__all__ = ["drop_pages", "swap_in", "swap_out"]


def swap_out(ledger: PageLedger, seq: Sequence, tier: SwapTier) -> None:
    """Saves all pages of `seq` and gives them back. What the tier raises leaves everything as it was."""
    if not {dst for _, dst in ledger.pending_copies}.isdisjoint(seq.page_ids):
        raise ValueError("seq must have its copies made to be swapped out, got one that waits. Call take_copies first.")
    pages = seq.row_pages().astype(np.int64)
    ticket = tier.save(torch.from_numpy(pages[pages >= 0]).to(ledger.device))
    seq._put_away("swapped out", (tier, ticket))


def drop_pages(seq: Sequence) -> None:
    """Gives the pages of `seq` back and keeps the ids of its committed tokens; reserved ones are forgotten."""
    seq._cut(seq.num_committed)
    seq._put_away("dropped", None)


def swap_in(ledger: PageLedger, seq: Sequence) -> npt.NDArray[Any]:
    """Puts `seq` on pages again; returns the ids of committed tokens whose keys and values must be computed again."""
    if seq.state == "dropped":
        return _find_again(seq)
    _load_again(ledger, seq)
    return seq._rows.tokens.view(seq._row)[:0]


def _find_again(seq: Sequence) -> npt.NDArray[Any]:
    rows, row = seq._rows, seq._row
    ids = rows.tokens.view(row).copy()
    num_found = 0
    if seq._cache is not None:
        match = seq._cache.match(ids, seq.namespace)
        if match.num_tokens:
            seq._move_lock(match.handle)
            rows.pages.extend(row, match.pages)
        num_found = match.num_tokens
    rows.tokens.truncate(row, num_found)
    rows.num_tokens[row] = rows.published[row] = seq._num_cached_tokens = num_found
    seq._come_back()
    return ids[num_found:]


def _load_again(ledger: PageLedger, seq: Sequence) -> None:
    """All pages from the tier but those whose tokens the prefix cache has."""
    rows, row, num_gone = seq._rows, seq._row, seq._num_pages_behind
    assert seq._ticket is not None  # it is swapped out
    tier, ticket = seq._ticket
    pages, num_known = _known_pages(ledger, seq)
    try:
        pages[num_known:] = ledger.obtain(pages.shape[0] - num_known)
    except BaseException:
        seq._move_lock(None)
        raise
    wanted = np.where(np.arange(pages.shape[0]) < num_known, -1, pages)[num_gone:].astype(np.int64)
    try:
        tier.load(ticket, torch.from_numpy(wanted).to(ledger.device))
    except BaseException:
        ledger.allocator.free(pages[num_known:])
        seq._move_lock(None)
        raise
    rows.pages.extend(row, pages)
    rows.first_page[row] = num_gone
    rows.published[row] = rows.lock_tokens[row]
    seq._come_back()
    if not num_gone:
        seq._publish_full_pages(seq.num_committed)
    tier.drop(ticket)


def _known_pages(ledger: PageLedger, seq: Sequence) -> tuple[PageArray, int]:
    """Room for all pages of a swapped-out sequence, -1 for none; the first need not be loaded.

    Those are what a window had given back, or else what the prefix cache has, which is locked.
    """
    pages = np.full(-(-seq.num_tokens // ledger.page_size), -1, np.int32)
    if seq._num_pages_behind or seq._cache is None:
        return pages, seq._num_pages_behind
    match = seq._cache.match(seq._rows.tokens.view(seq._row), seq.namespace)
    if match.num_tokens:
        seq._move_lock(match.handle)
    pages[: match.pages.shape[0]] = match.pages
    return pages, match.pages.shape[0]
