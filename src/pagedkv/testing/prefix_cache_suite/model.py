"""A prefix cache as a dictionary of prefixes: too slow to use, too simple to be wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...management.eviction import EvictionPolicy

__all__ = ["ModelPage", "Prefix", "PrefixModel"]


class Prefix(NamedTuple):
    """The last page of a prompt, with everything before it."""

    namespace: Any
    word: str

    def starts(self) -> list[Prefix]:
        """All prefixes of it that are whole pages, itself included, the shortest first."""
        return [Prefix(self.namespace, self.word[:length]) for length in range(1, len(self.word) + 1)]


@dataclass
class ModelPage:
    """One cached page and what a policy may look at."""

    page: int
    created: int
    last_access: int
    num_hits: int = 0
    priority: int = -(2**63)
    num_pages: int = 1
    is_evictable: bool = True


class PrefixModel:
    """Of the pages that nothing locks and nothing continues the policy chooses which goes."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.pages: dict[Prefix, ModelPage] = {}
        self.locks: Counter[Prefix] = Counter()
        self._time = 0

    def find(self, asked: Prefix) -> Prefix:
        """The longest cached prefix; no use of it."""
        starts = asked.starts()
        found = next((number for number, start in enumerate(starts) if start not in self.pages), len(starts))
        return Prefix(asked.namespace, asked.word[:found])

    def match(self, asked: Prefix) -> Prefix:
        """The longest cached prefix, used and hit."""
        found = self.find(asked)
        self.use(found, num_hits=1)
        return found

    def insert(self, asked: Prefix, pages: list[int], priority: int) -> None:
        """Adds what is not there of `asked`, on `pages`, and uses all of it."""
        new = [start for start in asked.starts() if start not in self.pages]
        for start, page in zip(new, pages, strict=True):
            self.pages[start] = ModelPage(page, self._time + 1, self._time + 1)
        self.use(asked, priority=priority)

    def use(self, prefix: Prefix, num_hits: int = 0, priority: int = -(2**63)) -> None:
        """Now is the last use of all pages of it."""
        self._time += 1
        for start in prefix.starts():
            page = self.pages[start]
            page.last_access = self._time
            page.num_hits += num_hits
            page.priority = max(page.priority, priority)

    def evict(self, num_pages: int) -> list[int]:
        """The pages dropped, in order."""
        dropped: list[int] = []
        locked = self.locked()
        while len(dropped) < num_pages:
            continued = {Prefix(it.namespace, it.word[:-1]) for it in self.pages}
            leaves = [it for it in self.pages if it not in continued and it not in locked]
            if not leaves:
                break
            first = min(leaves, key=lambda it: self.policy.priority(self.pages[it]))
            dropped.append(self.pages.pop(first).page)
        return dropped

    def locked(self) -> set[Prefix]:
        """The pages that locked handles protect."""
        return {start for prefix, count in self.locks.items() if count for start in prefix.starts()}
