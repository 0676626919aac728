"""Uses of pages in a hashed cache with a window, and the order in which pages go there."""

from __future__ import annotations

from typing import Any

from .eviction import EvictionPolicy, FIFOPolicy, FILOPolicy, LFUPolicy, LRUPolicy, SLRUPolicy, as_rank, is_ours
from .hashed_ghosts import GhostBooks
from .hashed_page import WindowPage
from .page_hash import PageHash

__all__ = ["LastPagesFirst", "WindowUses"]

# A millisecond of heap operations at most that a call does for earlier ones.
_MAX_TO_OFFER = 1024


class LastPagesFirst:
    """The order of another policy, in which of equals the page further from the beginning goes first."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self._is_ours = is_ours(policy)

    def priority(self, run: Any) -> tuple[float, ...]:
        """The rank by the other policy, then by position."""
        rank = self.policy.priority(run)
        return (rank if self._is_ours else as_rank(rank)) + (-run.position,)


class WindowUses(GhostBooks):
    """Each page is used by itself. A page that became evictable comes into the queue when this is asked next."""

    def __init__(self, page_size: int, policy: EvictionPolicy, page_hash: PageHash, *, has_window: bool) -> None:
        super().__init__(page_size, LastPagesFirst(policy) if has_window else policy, page_hash)
        # With these a use lowers no rank and no priority is looked at, so that uses need not look at the queue.
        self._is_plain_policy = type(policy) in (LRUPolicy, LFUPolicy, SLRUPolicy, FIFOPolicy, FILOPolicy)
        self._to_offer: list[WindowPage] = []

    def _use_pages(self, pages: list[WindowPage], num_hits: int = 0, priority: int = -(2**63)) -> None:
        self._time += 1
        time = self._time
        for page in pages:
            page.last_access = time
            page.num_hits += num_hits
        if not self._is_plain_policy:
            for page in pages:
                page.priority = max(page.priority, priority)
                self._queue.offer_lower(page)

    def _offer_later(self, pages: list[WindowPage]) -> None:
        self._to_offer += pages
        if len(self._to_offer) > _MAX_TO_OFFER:
            self._offer_now()

    def _offer_now(self) -> None:
        """Puts pages into the queue that it does not have, but not those that were locked meanwhile."""
        for page in self._to_offer:
            if page.queued_serial is None:
                self._queue.offer(page)
        self._to_offer.clear()
