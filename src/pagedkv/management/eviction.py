"""Which cached run of pages goes first when room is needed: policies, and the queue that asks them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

__all__ = [
    "CachedRun",
    "EvictionPolicy",
    "EvictionQueue",
    "FIFOPolicy",
    "FILOPolicy",
    "LFUPolicy",
    "LRUPolicy",
    "MRUPolicy",
    "PriorityPolicy",
    "SLRUPolicy",
    "as_rank",
    "eviction_policies",
    "is_ours",
    "make_eviction_policy",
    "register_eviction_policy",
]


class CachedRun(Protocol):
    """What a policy may look at: one run of cached pages, a node of the radix tree. Times count calls, not seconds."""

    @property
    def num_pages(self) -> int:
        """Pages of the run."""

    @property
    def created(self) -> int:
        """When its pages came into the cache."""

    @property
    def last_access(self) -> int:
        """When it was last inserted, matched or unlocked; never before that of a run that continues it."""

    @property
    def num_hits(self) -> int:
        """How many matches ran through it."""

    @property
    def priority(self) -> int:
        """The highest `priority` that an insert of it, or of a run that continues it, was given."""

    @property
    def is_evictable(self) -> bool:
        """True while it is in the cache, nothing is locked and nothing continues it."""


class EvictionPolicy(Protocol):
    """Orders runs; the least is evicted first. Ties go to the run that became evictable first.

    The order of a run may change only when the run is matched, inserted, locked, unlocked, split or shortened: it is a
    function of the run alone, never of the clock. It must not raise, and not call the cache.

    A run about which it raises is asked about again when pages are to go, before any other. If it still raises, the
    eviction ends there: it returns what it dropped until then, and raises the error when that is nothing.
    """

    def priority(self, run: CachedRun) -> tuple[float, ...]:
        """The rank of `run`, as a tuple of the same length for every run."""


class _Policy:
    """What the policies of this file have in common: no state, and a name to show."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class LRUPolicy(_Policy):
    """The run that was not used for the longest time goes first."""

    def priority(self, run: CachedRun) -> tuple[float, ...]:
        """Its last access."""
        return (run.last_access,)


class LFUPolicy(_Policy):
    """The run that was hit least often goes first, of equally many the one not used for longer."""

    def priority(self, run: CachedRun) -> tuple[float, ...]:
        """Its hits, then its last access."""
        return (run.num_hits, run.last_access)


class FIFOPolicy(_Policy):
    """The run that came first goes first, used or not."""

    def priority(self, run: CachedRun) -> tuple[float, ...]:
        """When it came."""
        return (run.created,)


class MRUPolicy(_Policy):
    """The run that was used last goes first: for scans longer than the cache."""

    def priority(self, run: CachedRun) -> tuple[float, ...]:
        """Its last access, the latest first."""
        return (-run.last_access,)


class FILOPolicy(_Policy):
    """The run that came last goes first, used or not."""

    def priority(self, run: CachedRun) -> tuple[float, ...]:
        """When it came, the latest first."""
        return (-run.created,)


class SLRUPolicy(_Policy):
    """Segmented LRU: runs that were never hit go before those that were, both in the order of LRU.

    A flood of prompts that nobody repeats displaces nothing that was ever of use. Runs stay in their segment.
    """

    def priority(self, run: CachedRun) -> tuple[float, ...]:
        """Whether it was hit, then its last access."""
        return (run.num_hits > 0, run.last_access)


class PriorityPolicy(_Policy):
    """The run of the lowest `priority=` goes first, of equal ones the one not used for longer."""

    def priority(self, run: CachedRun) -> tuple[float, ...]:
        """Its priority, then its last access."""
        return (run.priority, run.last_access)


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "fifo": FIFOPolicy,
    "filo": FILOPolicy,
    "lfu": LFUPolicy,
    "lru": LRUPolicy,
    "mru": MRUPolicy,
    "priority": PriorityPolicy,
    "slru": SLRUPolicy,
}


def eviction_policies() -> tuple[str, ...]:
    """The names that `eviction=` takes."""
    return tuple(sorted(_POLICIES))


def register_eviction_policy(name: str, factory: Callable[[], EvictionPolicy]) -> None:
    """Makes `eviction=name` mean `factory()`. Raises: ValueError when the name is taken."""
    if name in _POLICIES:
        raise ValueError(f"name must be new, got {name!r}. Registered: {', '.join(eviction_policies())}.")
    _POLICIES[name] = factory


def make_eviction_policy(eviction: str | EvictionPolicy) -> EvictionPolicy:
    """A policy from its name, or the instance itself."""
    if isinstance(eviction, str):
        if eviction not in _POLICIES:
            names = " or ".join(map(repr, eviction_policies()))
            raise ValueError(f"eviction must be {names} or a policy, got {eviction!r}.")
        return _POLICIES[eviction]()
    if isinstance(eviction, type) or not callable(getattr(eviction, "priority", None)):
        raise TypeError(f"eviction must be a name or have a method priority(run), got {type(eviction).__name__}.")
    return eviction


def is_ours(policy: EvictionPolicy) -> bool:
    """True for a policy of this package, whose ranks need no look."""
    return type(policy).__module__.startswith(f"{__package__}.")


def as_rank(priority: Iterable[float]) -> tuple[float, ...]:
    """What a policy answered as numbers that can be put in order; NaN comes before all."""
    return tuple(-math.inf if math.isnan(number) else number for number in map(float, priority))


class _Queued(CachedRun, Protocol):
    """What the queue keeps on a run: the serial number and the rank of its entry; no serial number, no entry."""

    queued_serial: int | None
    queued_priority: tuple[float, ...]


Run = TypeVar("Run", bound=_Queued)


class EvictionQueue(Generic[Run]):
    """The evictable runs in the order of a policy.

    A run keeps its serial number, by which ties are broken, until it is not evictable any more. An entry whose run has
    another rank by now, or none, stays in the heap until it comes up or there are as many of those as of others.

    Cost: a heap operation a call, on average. The tree is never walked.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self._is_ours = is_ours(policy)
        # The rank, the serial number, a number that no two entries share, and the run.
        self._heap: list[tuple[tuple[float, ...], int, int, Run]] = []
        self._num_live = 0
        self._next_serial = self._next_entry = 0

    def offer(self, run: Run) -> None:
        """Puts `run` where its rank belongs, or takes it out when it is not evictable."""
        if not run.is_evictable:
            self._withdraw(run)
            return
        try:
            priority = self._rank(run)
        except Exception:  # noqa: BLE001
            # The least rank there is: `first` asks again.
            priority = ()
        self._put(run, priority)

    def offer_lower(self, run: Run) -> None:
        """The same for a run that may have a lower rank than when it was offered; a higher one is found by `first`."""
        try:
            is_lower = run.queued_serial is not None and self._rank(run) < run.queued_priority
        except Exception:  # noqa: BLE001
            is_lower = True
        if is_lower:
            self.offer(run)

    def _rank(self, run: Run) -> tuple[float, ...]:
        priority = self.policy.priority(run)
        return priority if self._is_ours else as_rank(priority)

    def _put(self, run: Run, priority: tuple[float, ...]) -> None:
        if run.queued_serial is None:
            run.queued_serial = self._next_serial
            self._next_serial += 1
            self._num_live += 1
        elif priority == run.queued_priority:
            return
        run.queued_priority = priority
        heapq.heappush(self._heap, (priority, run.queued_serial, self._next_entry, run))
        self._next_entry += 1
        if len(self._heap) > 2 * self._num_live + 64:
            # One a run, even when its rank went to and fro.
            self._heap = list({entry[1]: entry for entry in self._heap if self._is_live(entry)}.values())
            heapq.heapify(self._heap)

    def first(self) -> Run | None:
        """The evictable run of least rank, or None. Looks again at runs that changed and were not offered since.

        What the policy raises comes out; nothing has changed then. A run is asked for once: a policy may have another
        answer each time.
        """
        asked: set[int] = set()
        while self._heap:
            entry = self._heap[0]
            run, serial = entry[3], entry[1]
            if not self._is_live(entry):
                heapq.heappop(self._heap)
            elif not run.is_evictable:
                self._withdraw(run)
            elif serial in asked:
                return run
            else:
                priority = self._rank(run)
                if priority == entry[0]:
                    return run
                asked.add(serial)
                self._put(run, priority)
        return None

    def pop(self) -> Run | None:
        """Takes the evictable run of least rank out of the queue, or None."""
        run = self.first()
        if run is not None:
            self._withdraw(run)
        return run

    def clear(self) -> None:
        """Forgets every entry."""
        for *_, run in self._heap:
            run.queued_serial = None
        self._heap.clear()
        self._num_live = 0

    def _withdraw(self, run: Run) -> None:
        if run.queued_serial is not None:
            run.queued_serial = None
            self._num_live -= 1

    @staticmethod
    def _is_live(entry: tuple[tuple[float, ...], int, int, Run]) -> bool:
        return entry[3].queued_serial == entry[1] and entry[3].queued_priority == entry[0]

    def __len__(self) -> int:
        """Entries, those included that mean nothing any more."""
        return len(self._heap)
