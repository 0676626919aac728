"""How a sequence leaves its pages and gets others: its bytes wait in a tier, or are computed again."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..errors import TierError
from .allocator import PageArray
from .sequence_prefix import SequencePrefix
from .swap_tier import SwapTier

__all__ = ["SequenceAway", "SequenceState"]

SequenceState = Literal["on pages", "swapped out", "dropped", "closed"]


class SequenceAway(SequencePrefix):
    """The state of a sequence; management/sequence.py has the calls that change it.

    _ticket: the tier that has a copy of its pages, and the copy's name there. _num_pages_behind: how many pages a
             window had given back when it went away.
    """

    _state: SequenceState = "on pages"
    _ticket: tuple[SwapTier, Any] | None = None
    _num_pages_behind = 0

    def _swap_out(self, tier: SwapTier) -> None:
        """Saves all pages and gives them back. What the tier raises leaves everything as it was."""
        self._drop_ticket()
        ticket = self._save_pages(tier)
        try:
            self._put_away("swapped out", (tier, ticket))
        except Exception:  # of a user's policy or cache
            tier.drop(ticket)
            raise

    def _swap_in(self) -> npt.NDArray[Any]:
        """On pages again; returns the ids of committed tokens whose keys and values must be computed again."""
        if self._state == "swapped out":
            self._load_pages()
            self._finish_load()
            return np.empty(0, np.int64)
        ids = self._rows.tokens.view(self._row).copy()
        return ids[self._find_again(ids.shape[0]) :]

    def _save_pages(self, tier: SwapTier) -> Any:
        """Copies the bytes of all pages that it names into a tier; returns the ticket."""
        budget, pages = self._budget, self._page_view().astype(np.int64)
        if not {dst for _, dst in budget.pending_copies}.isdisjoint(pages.tolist()):
            raise ValueError(
                "seq must have its copies made to be swapped out, got one that waits. Call take_copies first."
            )
        try:
            return tier.save(torch.from_numpy(pages[pages >= 0]))
        except MemoryError as error:
            raise TierError(f"the tier must have memory for {np.count_nonzero(pages >= 0)} pages: {error}.") from error

    def _load_pages(self) -> None:
        """On pages again: all of them from the tier, which keeps its copy, but those that the prefix cache has."""
        rows, row, budget, num_gone = self._rows, self._row, self._budget, self._num_pages_behind
        assert self._ticket is not None  # it is swapped out
        tier, ticket = self._ticket
        pages, num_known = self._known_pages()
        try:
            pages[num_known:] = budget.obtain(pages.shape[0] - num_known)
        except BaseException:
            self._move_lock(None)
            raise
        budget.cancel_copies(pages[num_known:])
        wanted = np.where(np.arange(pages.shape[0]) < num_known, -1, pages)[num_gone:].astype(np.int64)
        try:
            tier.load(ticket, torch.from_numpy(wanted))
        except BaseException:
            budget.allocator.free(pages[num_known:])
            self._move_lock(None)
            raise
        rows.pages.extend(row, pages)
        rows.first_page[row] = np.count_nonzero(pages < 0)
        rows.published[row] = rows.lock_tokens[row]
        self._come_back()

    def _known_pages(self) -> tuple[PageArray, int]:
        """Room for all its pages, -1 for none, of which the first need not be loaded.

        Those are what a window had given back, or else what the prefix cache has, which is locked.
        """
        rows, row, cache = self._rows, self._row, self._cache
        pages = np.full(-(-self._num_tokens // self._ledger.page_size), -1, np.int32)
        if self._num_pages_behind or cache is None:
            return pages, self._num_pages_behind
        match = cache.match(rows.tokens.view(row), self._namespace)
        if match.num_tokens:
            self._move_lock(match.handle)
        pages[: match.pages.shape[0]] = match.pages
        return pages, match.pages.shape[0]

    def _finish_load(self) -> None:
        """Publishes what the prefix cache has not, and drops the copy; one that the tier does not let go of now is
        dropped when the sequence goes away or closes.
        """
        with suppress(Exception):
            if not self._num_pages_behind or self._ledger.window is not None:
                self._publish_full_pages()
        self._give_back_behind_window()
        with suppress(Exception):
            self._drop_ticket()

    def _drop_ticket(self) -> None:
        if self._ticket is not None:
            tier, ticket = self._ticket
            tier.drop(ticket)
            self._ticket = None

    def _put_away(self, state: SequenceState, ticket: tuple[SwapTier, Any] | None) -> None:
        """Gives all pages back as a close does, and stays alive without."""
        self._num_pages_behind = self._rows.first_page.item(self._row)
        self._ticket = ticket
        self._state = state
        try:
            self._give_back_all(self._publish_behind_duplicates())
        except Exception:
            self._state, self._ticket = "on pages", None
            raise

    def _drop_to(self, num_tokens: int) -> None:
        """Dropped, wherever it was, with the ids of its first tokens alone."""
        self._drop_ticket()
        if self._state == "on pages":
            self._put_away("dropped", None)
        self._state = "dropped"
        self._rows.tokens.truncate(self._row, num_tokens)
        self._rows.num_tokens[self._row] = num_tokens

    def _find_again(self, num_tokens: int) -> int:
        """On pages again after it was dropped, with what the prefix cache has of its first tokens; how many it has."""
        rows, row, cache = self._rows, self._row, self._cache
        num_found = 0
        if cache is not None:
            match = cache.match(rows.tokens.view(row, 0, num_tokens), self._namespace)
            num_found = match.num_tokens
            if num_found:
                self._move_lock(match.handle)
                rows.pages.extend(row, match.pages)
                rows.first_page[row] = np.count_nonzero(match.pages < 0)
        rows.num_tokens[row] = rows.published[row] = self._num_cached_tokens = num_found
        self._come_back()
        rows.tokens.truncate(row, num_found)
        return num_found

    def _come_back(self) -> None:
        """On pages again, which the row names; a copy in a tier is not dropped yet."""
        self._state = "on pages"
        self._rows.changed(self._row)
