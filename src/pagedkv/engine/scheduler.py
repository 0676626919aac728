"""Who computes which tokens in a step, and who gives pages back when there are none left."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

import torch

from ..errors import OutOfPagesError
from ..kernels.compare_key import common_prefix_len
from ..management.manager import KVCacheManager
from ..management.sequence import Sequence
from .beam_group import is_torn, take_tokens
from .continuation import Continuation
from .page_needs import num_pages_in_all, num_pages_to_come
from .request import Request

__all__ = ["Schedule", "Scheduler", "Work"]

_Part = tuple[Continuation, int]


@dataclass(frozen=True, eq=False)
class Work:
    """Tokens [start, stop) of a continuation's ids, to be computed into `slots`."""

    continuation: Continuation
    seq: Sequence
    start: int
    stop: int
    slots: torch.Tensor

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
        return self.num_tokens == 1 and self.start >= len(self.request.prompt_ids)

    @property
    def receivers(self) -> list[Continuation]:
        """The continuations whose next token can be sampled after it: its own, and what waits for it and ends there."""
        # While any follow, nobody but the trunk has works.
        own = [self.continuation, *self.request.followers]
        return [each for each in own if len(each.ids) == self.stop]


@dataclass
class Schedule:
    """One step. `failed` requests cannot be run by anybody's leaving; the engine answers them with the error."""

    works: list[Work] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    failed: list[tuple[Request, OutOfPagesError]] = field(default_factory=list)


class Scheduler:
    """Requests in order of arrival, waiting for pages or running on them.

    max_num_seqs: continuations of running requests, all together; max_batch_tokens is a limit of them too.
    Rule:   decoding goes first, one token a continuation; what is left of max_batch_tokens is prefill, in chunks,
            oldest first. Beams decode all of them or none.
            A request is admitted when the pages of all its tokens are there, and one for each of its continuations to
            grow, besides those that running ones still need.
            When pages run out the newest running request gives its own back and waits; its tokens are kept, and their
            keys and values are computed again (or found in the prefix cache) when it is admitted the next time.
            A request that begins like one in prefill waits until the shared pages are in the prefix cache.
    """

    def __init__(
        self, manager: KVCacheManager, max_batch_tokens: int, max_num_seqs: int, *, shares_prefixes: bool = True
    ) -> None:
        self._manager = manager
        self._max_batch_tokens = max_batch_tokens
        # Every running continuation can decode in every step.
        self.max_num_seqs = min(max_num_seqs, max_batch_tokens)
        self._shares_prefixes = shares_prefixes
        self._leaders: dict[int, tuple[Request, int]] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Puts a request where its arrival says."""
        request.status = "waiting"
        insort(self.waiting, request, key=_arrival)

    def remove(self, request: Request) -> None:
        """Forgets a request and gives its pages back."""
        for requests in (self.waiting, self.running):
            if request in requests:
                requests.remove(request)
        self._leaders.pop(request.id, None)
        request.give_pages_back()

    def schedule(self) -> Schedule:
        """The work of the next step, with its slots reserved. Nothing is reserved when it raises."""
        self._take_back_what_was_broken_off()
        schedule = Schedule()
        budget = self._max_batch_tokens
        due = [(request, _due(request)) for request in self.running]
        num_decoding = sum(num_tokens == 1 for _, parts in due for _, num_tokens in parts)
        for request, parts in due:
            if request.status != "running":
                continue  # preempted by an older one just now
            num_decoding -= sum(num_tokens == 1 for _, num_tokens in parts)
            works = self._reserve(request, _within(parts, budget - num_decoding), schedule)
            schedule.works += works
            budget -= sum(work.num_tokens for work in works)
        if not schedule.preempted:
            self._admit(schedule, budget)
        return schedule

    def _take_back_what_was_broken_off(self) -> None:
        """An interrupt (Ctrl-C) may end a step anywhere: slots reserved in it, and a token that was computed but not
        sampled, are to be computed again."""
        for request in list(self.running):
            if is_torn(request):
                take_tokens(request)
                self._preempt(request)
                continue
            for continuation in request.live:
                seq = continuation.seq
                if seq is None:
                    continue
                kept = min(seq.num_committed, request.stop_of(continuation) - 1)
                if seq.num_tokens > kept:
                    seq.truncate(kept)

    def _reserve(self, request: Request, parts: list[_Part], schedule: Schedule) -> list[Work]:
        """The works of a running request with their slots; none when it had to give its pages back for them."""
        works: list[Work] = []
        for continuation, num_tokens in parts:
            seq = continuation.seq
            assert seq is not None  # it runs
            start = seq.num_tokens
            while (slots := seq.try_append(num_tokens)) is None:
                newest = self.running[-1]
                if newest is request and len(self.running) == 1:
                    # Whoever has the pages is not one of ours.
                    needed = self._num_pages(start + num_tokens) - self._num_pages(start)
                    schedule.failed.append((request, self._out_of_pages(max(needed, 1))))
                    return []
                self._preempt(newest)
                schedule.preempted.append(newest)
                if newest is request:
                    return []
            works.append(Work(continuation, seq, start, start + num_tokens, slots))
        return works

    def _preempt(self, request: Request) -> None:
        request.give_pages_back()
        request.num_preemptions += 1
        self.running.remove(request)
        self.add(request)

    def _admit(self, schedule: Schedule, budget: int) -> None:
        num_seqs = sum(len(request.live) for request in self.running)
        for request in list(self.waiting):
            if budget <= 0 or num_seqs >= self.max_num_seqs:
                return
            if self._follows(request):
                continue
            num_seqs += len(request.live)
            if num_seqs > self.max_num_seqs:
                return
            # Without the last token: its logits are needed, so it is computed even when it is cached.
            trunk, stop = request.live[0], request.num_shared
            seq = self._manager.open(trunk.ids[: stop - 1], request.namespace)
            leader = self._leader(request, seq.num_tokens)
            if leader is not None:
                seq.close()
                self._leaders[request.id] = leader
                num_seqs -= len(request.live)
                continue
            num_tokens = min(stop - seq.num_tokens, budget)
            slots = seq.try_append(num_tokens) if self._has_room(request, seq.num_tokens) else None
            if slots is None:
                seq.close()
                if not self.running:
                    # Nobody runs, so nobody will make room: somebody else holds pages of this manager.
                    needed = num_pages_in_all(request, self._manager.page_size)
                    schedule.failed.append((request, self._out_of_pages(needed)))
                return
            if not request.num_preemptions:
                request.num_cached_tokens = seq.num_cached_tokens
            trunk.seq = seq
            request.status = "running"
            self.waiting.remove(request)
            insort(self.running, request, key=_arrival)
            schedule.admitted.append(request)
            start = seq.num_committed
            schedule.works.append(Work(trunk, seq, start, start + num_tokens, slots))
            budget -= num_tokens

    def _has_room(self, request: Request, num_cached: int) -> bool:
        """Whether all tokens of a request fit beside what running ones still need, and a page for each continuation to
        grow."""
        page_size = self._manager.page_size
        available = self._manager.num_free_pages + self._manager.num_evictable_pages
        needed = num_pages_in_all(request, page_size) - self._num_pages(num_cached)
        if not self.running:
            return needed <= available
        needed += sum(num_pages_to_come(other, page_size) for other in self.running)
        return needed + len(request.live) <= available

    def _out_of_pages(self, needed: int) -> OutOfPagesError:
        stats = self._manager.stats()
        pinned = stats.num_pages - stats.free - stats.evictable
        return OutOfPagesError(needed, stats.free, stats.evictable, pinned, stats.num_sequences)

    def _follows(self, request: Request) -> bool:
        """Whether the request still waits for pages that another one is computing."""
        found = self._leaders.get(request.id)
        if found is None:
            return False
        leader, num_shared = found
        if leader.status == "running" and leader.live[0].num_computed < num_shared:
            return True
        del self._leaders[request.id]
        return False

    def _leader(self, request: Request, num_cached: int) -> tuple[Request, int] | None:
        """The running request that will have put the most of this one's prefix into the cache, beyond what is there."""
        if not self._shares_prefixes:
            return None
        best, page_size = None, self._manager.page_size
        most = num_cached
        for other in self.running:
            trunk = other.live[0]
            if trunk.num_uncomputed <= 1 or not _same_namespace(other, request):
                continue
            num_shared = min(common_prefix_len(request.prompt_array, other.prompt_array), request.num_shared - 1)
            num_shared = num_shared // page_size * page_size
            if num_shared > most and num_shared > trunk.num_computed // page_size * page_size:
                best, most = (other, num_shared), num_shared
        return best

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._manager.page_size)


def _arrival(request: Request) -> int:
    return request.id


def _due(request: Request) -> list[_Part]:
    """What a running request has to compute before its next tokens, by continuation."""
    live = request.live
    if request.followers:
        return [(live[0], request.num_shared - live[0].num_computed)]
    behind = [(beam, beam.num_uncomputed - 1) for beam in live if beam.num_uncomputed > 1]
    if request.search is not None and behind:
        # Beams are compared with each other, so the last token of each is left until all can compute theirs.
        return behind
    return [(continuation, continuation.num_uncomputed) for continuation in live]


def _within(parts: list[_Part], budget: int) -> list[_Part]:
    """The parts that fit into a budget of tokens: all of one token each, then as much of the others as is left."""
    left = budget - sum(num_tokens == 1 for _, num_tokens in parts)
    chosen = []
    for continuation, wanted in parts:
        num_tokens = 1 if wanted == 1 else min(wanted, left)
        if num_tokens > 0:
            chosen.append((continuation, num_tokens))
            left -= num_tokens if wanted > 1 else 0
    return chosen


def _same_namespace(a: Request, b: Request) -> bool:
    return type(a.namespace) is type(b.namespace) and a.namespace == b.namespace
