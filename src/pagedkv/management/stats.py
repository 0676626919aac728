"""What a manager counts, and the picture it gives of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counters", "ManagerStats"]


@dataclass
class Counters:
    """What happened since the manager was made."""

    lookups: int = 0
    asked_tokens: int = 0
    hit_tokens: int = 0
    evicted_pages: int = 0
    copied_pages: int = 0


@dataclass(frozen=True)
class ManagerStats:
    """The state of a manager at one moment, in pages unless the name says otherwise.

    free + owned + cached is num_pages: a page has no owner, is named by a live sequence, or is held by the prefix cache
    alone. `shared` pages are named by two or more sequences. `published` pages are in the prefix cache, named or not;
    `evictable` ones can be freed for an append at once. slots_reserved and tokens are summed over sequences, so a page
    that three sequences name counts three times: 1 - tokens / slots_reserved is what last pages waste.
    """

    num_pages: int
    page_size: int
    num_sequences: int
    free: int
    owned: int
    shared: int
    cached: int
    published: int
    evictable: int
    slots_reserved: int
    tokens: int
    lookups: int
    asked_tokens: int
    hit_tokens: int
    evicted_pages: int
    copied_pages: int

    @property
    def hit_rate(self) -> float:
        """Part of the tokens asked for by `open` that the prefix cache had, 0 when none were."""
        return self.hit_tokens / self.asked_tokens if self.asked_tokens else 0.0
