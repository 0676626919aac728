"""Which cached run of pages goes first when room is needed: policies, and the queue that asks them."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

__all__ = [
    "CachedRun",
    "EvictionPolicy",
    "EvictionQueue",
    "LRUPolicy",
    "eviction_policies",
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
    def is_evictable(self) -> bool:
        """True while it is in the cache, nothing is locked and nothing continues it."""


class EvictionPolicy(Protocol):
    """Orders runs by priority; the least is evicted first. Ties go to the run that became evictable first.

    The priority of a run may change only when the run is matched, inserted, locked or unlocked: it is a function of the
    run alone, never of the clock.
    """

    def priority(self, run: CachedRun) -> tuple[float, ...]:
        """The rank of `run`, as a tuple of the same length for every run."""


class LRUPolicy:
    """The run that was not used for the longest time goes first."""

    def priority(self, run: CachedRun) -> tuple[float, ...]:
        """Its last access."""
        return (run.last_access,)

    def __repr__(self) -> str:
        return "LRUPolicy()"


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRUPolicy}


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
    if not callable(getattr(eviction, "priority", None)):
        raise TypeError(f"eviction must be a name or have a method priority(run), got {type(eviction).__name__}.")
    return eviction


class _Queued(CachedRun, Protocol):
    """What the queue keeps on a run: the serial number and the priority of its entry, None when it has none."""

    queued_serial: int | None
    queued_priority: tuple[float, ...]


Run = TypeVar("Run", bound=_Queued)


class EvictionQueue(Generic[Run]):
    """The evictable runs by priority, brought up to date only when asked.

    A run has at most one live entry. Its priority may have risen and the run may have been locked since: `pop` looks
    again, so neither costs anything when it happens. The tree is never walked.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self._heap: list[tuple[tuple[float, ...], int, Run]] = []
        self._next_serial = 0
        self._num_stale = 0

    def offer(self, run: Run) -> None:
        """Tells that `run` may have become evictable, or that its priority may have fallen."""
        if not run.is_evictable:
            return
        priority = self.policy.priority(run)
        if run.queued_serial is None:
            self._push(run, priority)
        elif priority < run.queued_priority:
            self._num_stale += 1
            self._push(run, priority)
            if 2 * self._num_stale > len(self._heap) + 64:
                self._drop_stale()

    def pop(self) -> Run | None:
        """Takes the evictable run of least priority out of the queue, or None."""
        while self._heap:
            priority, serial, run = heapq.heappop(self._heap)
            if run.queued_serial != serial:
                self._num_stale -= 1
                continue
            run.queued_serial = None
            if not run.is_evictable:
                continue
            current = self.policy.priority(run)
            if current > priority:
                self._push(run, current)
                continue
            return run
        return None

    def clear(self) -> None:
        """Forgets every entry."""
        for _, _, run in self._heap:
            run.queued_serial = None
        self._heap.clear()
        self._num_stale = 0

    def _push(self, run: Run, priority: tuple[float, ...]) -> None:
        run.queued_serial, run.queued_priority = self._next_serial, priority
        heapq.heappush(self._heap, (priority, self._next_serial, run))
        self._next_serial += 1

    def _drop_stale(self) -> None:
        self._heap = [entry for entry in self._heap if entry[2].queued_serial == entry[1]]
        heapq.heapify(self._heap)
        self._num_stale = 0

    def __len__(self) -> int:
        return len(self._heap)
