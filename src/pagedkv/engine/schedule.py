"""What one step computes: which tokens of which continuations, and the slots and tables for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import OutOfPagesError
from ..management.manager import KVCacheManager
from ..management.sequence import Sequence
from ..management.step_batch import StepBatch
from .continuation import Continuation
from .request import Request

__all__ = ["Schedule", "Work", "commit", "due_works", "reserve", "within"]


@dataclass(eq=False, slots=True)
class Work:
    """Tokens [start, stop) of a continuation's ids, to be computed."""

    continuation: Continuation
    seq: Sequence
    start: int
    stop: int

    @property
    def request(self) -> Request:
        """Whose continuation it is."""
        return self.continuation.request

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        return self.continuation.ids[self.start : self.stop]

    @property
    def num_tokens(self) -> int:
        """How many they are."""
        return self.stop - self.start

    @property
    def is_decode(self) -> bool:
        """One token that was sampled in the step before, in contrast to prompts and what is computed again."""
        return self.stop - self.start == 1 and self.start >= len(self.continuation.request.prompt_ids)

    @property
    def receivers(self) -> list[Continuation]:
        """The continuations whose next token can be sampled after it: its own, and what waits for it and ends there."""
        # While any follow, nobody but the trunk has works.
        own = [self.continuation, *self.continuation.request.followers]
        return [each for each in own if len(each.ids) == self.stop]


@dataclass
class Schedule:
    """One step. `batch` has the slots and tables of all works in their order, and is None without works.

    `failed` requests cannot be run by anybody's leaving; the engine answers them with the error.
    """

    works: list[Work] = field(default_factory=list)
    batch: StepBatch | None = None
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    failed: list[tuple[Request, OutOfPagesError]] = field(default_factory=list)


def due_works(request: Request) -> list[Work]:
    """What a running request has to compute before its next tokens."""
    live = request.live
    if request.followers:
        return [_work(live[0], request.num_shared)]
    works = [_work(continuation, len(continuation.ids)) for continuation in live]
    if request.search is not None:
        behind = [work for work in works if work.num_tokens > 1]
        for work in behind:
            # Beams are compared with each other, so the last token of each is left until all can compute theirs.
            work.stop -= 1
        return behind or works
    return works


def within(works: list[Work], budget: int) -> list[Work]:
    """The works that fit into a budget of tokens: all of one token, then as much of the others as is left."""
    left = budget - sum(work.stop - work.start == 1 for work in works)
    chosen = []
    for work in works:
        if work.stop - work.start > 1:
            work.stop = min(work.stop, work.start + left)
            left -= work.stop - work.start
        if work.stop > work.start:
            chosen.append(work)
    return chosen


def reserve(manager: KVCacheManager, works: list[Work]) -> StepBatch:
    """The slots and tables of all works, in one call of the manager.

    Raises: OutOfPagesError when the pages of all together are not there; nothing has changed then.
    """
    counts = [work.stop - work.start for work in works]
    # One number for all is the short way through a step of decoding.
    return manager.batch([work.seq for work in works], 1 if sum(counts) == len(counts) else counts)


def commit(manager: KVCacheManager, works: list[Work]) -> None:
    """Names the tokens of all works, whose keys and values are written: those of one token in one call."""
    single = [work for work in works if work.stop - work.start == 1]
    if single:
        manager.commit([work.seq for work in single], [work.continuation.ids[work.start] for work in single])
    if len(single) < len(works):
        for work in works:
            if work.stop - work.start > 1:
                work.seq.commit(work.token_ids)


def _work(continuation: Continuation, stop: int) -> Work:
    seq = continuation.seq
    assert seq is not None  # it runs
    return Work(continuation, seq, seq.num_committed, stop)
