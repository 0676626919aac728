"""What a manager counts, and the picture it gives of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .page_budget import PageBudget

__all__ = ["Counters", "ManagerStats", "count_pages"]


@dataclass
class Counters:
    """What happened since the manager was made."""

    lookups: int = 0
    asked_tokens: int = 0
    hit_tokens: int = 0
    evicted_pages: int = 0
    copied_pages: int = 0

    def count_lookup(self, num_asked: int, num_found: int) -> None:
        """One prompt that was looked for in the prefix cache."""
        self.lookups += 1
        self.asked_tokens += num_asked
        self.hit_tokens += num_found


@dataclass(frozen=True)
class ManagerStats:
    """The state of a manager at one moment, in pages unless the name says otherwise.

    free + owned + cached + reserved is num_pages: a page has no owner, is named by a live sequence, is held by the
    prefix cache alone (or waits to be copied from), or is nobody's. `shared` pages are named by two or more sequences.
    `published` pages are in the prefix cache, named or not; `evictable` ones can be freed for an append at once; the
    cached pages that cannot are pinned. num_away sequences are swapped out or dropped. slots_reserved and tokens are
    summed over the others, without what a window gave back, so a page that three sequences name counts three times:
    slots_unused of the slots hold no token.

    Groups of layers that share pages are counted together: a sequence has a part, with tokens and slots, in each of
    them, and page_size is the number of tokens after which all of them begin a page.
    """

    num_pages: int
    page_size: int
    num_sequences: int
    num_away: int
    free: int
    owned: int
    shared: int
    cached: int
    published: int
    evictable: int
    reserved: int
    slots_reserved: int
    tokens: int
    lookups: int
    asked_tokens: int
    hit_tokens: int
    evicted_pages: int
    copied_pages: int

    @property
    def slots_unused(self) -> int:
        """Reserved slots without a token: the rest of last pages."""
        return self.slots_reserved - self.tokens

    @property
    def hit_rate(self) -> float:
        """Part of the tokens asked for by `open` that the prefix cache had, 0 when none were."""
        return self.hit_tokens / self.asked_tokens if self.asked_tokens else 0.0


def count_pages(budget: PageBudget) -> ManagerStats:
    """Counts now; the caller holds the lock. Cost: a pass over the pages that sequences name."""
    allocator = budget.allocator
    named = np.zeros(allocator.num_pages, np.int32)
    num_away = num_slots = num_tokens = 0
    for ledger in budget.ledgers:
        named += ledger.num_named()
        rows = ledger.rows
        on_pages = np.array([seq._row for seq in ledger.live.values() if seq.state == "on pages"], np.int64)
        gone = int(rows.first_page[on_pages].sum())
        num_away += len(ledger.live) - on_pages.shape[0]
        num_slots += (int(rows.pages.size[on_pages].sum()) - gone) * ledger.page_size
        num_tokens += int(rows.num_tokens[on_pages].sum()) - gone * ledger.page_size
    owned = int(np.count_nonzero(named))
    return ManagerStats(
        num_pages=allocator.num_pages,
        page_size=math.lcm(*(ledger.page_size for ledger in budget.ledgers)),
        num_sequences=budget.num_sequences,
        num_away=num_away,
        free=allocator.num_free,
        owned=owned,
        shared=int(np.count_nonzero(named > 1)),
        cached=allocator.num_pages - allocator.num_free - owned - allocator.num_reserved,
        published=sum(cache.num_cached_pages for cache in budget.caches),
        evictable=budget.num_evictable,
        reserved=allocator.num_reserved,
        slots_reserved=num_slots,
        tokens=num_tokens,
        **vars(budget.counters),
    )
