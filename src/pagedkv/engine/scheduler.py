"""Who computes which tokens in a step, and who gives pages back when there are none left."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

import torch

from ..errors import OutOfPagesError
from ..kernels.compare_key import common_prefix_len
from ..management.manager import KVCacheManager
from ..management.sequence import Sequence
from .request import Request

__all__ = ["Schedule", "Scheduler", "Work"]


@dataclass(frozen=True, eq=False)
class Work:
    """Tokens [start, stop) of a request's ids, to be computed into `slots`."""

    request: Request
    seq: Sequence
    start: int
    stop: int
    slots: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return self.stop - self.start

    @property
    def is_decode(self) -> bool:
        """One token that was sampled in the step before, in contrast to prompts and what is computed again."""
        return self.num_tokens == 1 and self.start >= len(self.request.prompt_ids)

    @property
    def gives_token(self) -> bool:
        """Whether the next token can be sampled after it."""
        return self.stop == len(self.request.ids)


@dataclass
class Schedule:
    """One step. `failed` requests cannot be run by anybody's leaving; the engine answers them with the error."""

    works: list[Work] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    failed: list[tuple[Request, OutOfPagesError]] = field(default_factory=list)


class Scheduler:
    """Requests in order of arrival, waiting for pages or running on them.

    Rule:   decoding goes first, one token each; what is left of max_batch_tokens is prefill, in chunks, oldest first.
            A request is admitted when the pages of all its tokens are there besides those that running ones still need.
            When pages run out the newest running request gives its own back and waits; its tokens are kept, and their
            keys and values are computed again (or found in the prefix cache) when it is admitted the next time.
            A request that begins like one in prefill waits until the shared pages are in the prefix cache.
    """

    def __init__(
        self, manager: KVCacheManager, max_batch_tokens: int, max_num_seqs: int, *, shares_prefixes: bool = True
    ) -> None:
        self._manager = manager
        self._max_batch_tokens = max_batch_tokens
        # Every running request can decode in every step.
        self._max_num_seqs = min(max_num_seqs, max_batch_tokens)
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
        _close(request)

    def schedule(self) -> Schedule:
        """The work of the next step, with its slots reserved. Nothing is reserved when it raises."""
        self._take_back_what_was_broken_off()
        schedule = Schedule()
        budget = self._max_batch_tokens
        num_decoding = sum(request.num_uncomputed == 1 for request in self.running)
        for request in list(self.running):
            if request.status != "running":
                continue  # preempted by an older one just now
            num_tokens = request.num_uncomputed
            if num_tokens == 1:
                num_decoding -= 1
            else:
                num_tokens = min(num_tokens, budget - num_decoding)
            if num_tokens > 0 and self._schedule_running(request, num_tokens, schedule):
                budget -= num_tokens
        if not schedule.preempted:
            self._admit(schedule, budget)
        return schedule

    def _take_back_what_was_broken_off(self) -> None:
        """An interrupt (Ctrl-C) may end a step anywhere: slots reserved in it, and a token that was computed but not
        sampled, are to be computed again."""
        for request in self.running:
            seq = request.seq
            assert seq is not None  # it runs
            kept = min(seq.num_committed, len(request.ids) - 1)
            if seq.num_tokens > kept:
                seq.truncate(kept)

    def _schedule_running(self, request: Request, num_tokens: int, schedule: Schedule) -> bool:
        seq = request.seq
        assert seq is not None  # it runs
        while (slots := seq.try_append(num_tokens)) is None:
            newest = self.running[-1]
            if newest is request and len(self.running) == 1:
                # Whoever has the pages is not one of ours.
                needed = self._num_pages(request.num_computed + num_tokens) - self._num_pages(request.num_computed)
                schedule.failed.append((request, self._out_of_pages(needed)))
                return False
            self._preempt(newest)
            schedule.preempted.append(newest)
            if newest is request:
                return False
        start = request.num_computed
        schedule.works.append(Work(request, seq, start, start + num_tokens, slots))
        return True

    def _preempt(self, request: Request) -> None:
        _close(request)
        request.num_preemptions += 1
        self.running.remove(request)
        self.add(request)

    def _admit(self, schedule: Schedule, budget: int) -> None:
        for request in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._max_num_seqs:
                return
            if self._follows(request):
                continue
            # Without the last token: its logits are needed, so it is computed even when it is cached.
            seq = self._manager.open(request.ids[:-1], request.namespace)
            leader = self._leader(request, seq.num_tokens)
            if leader is not None:
                seq.close()
                self._leaders[request.id] = leader
                continue
            num_tokens = min(len(request.ids) - seq.num_tokens, budget)
            slots = seq.try_append(num_tokens) if self._has_room(request, seq.num_tokens) else None
            if slots is None:
                seq.close()
                if not self.running:
                    # Nobody runs, so nobody will make room: somebody else holds pages of this manager.
                    schedule.failed.append((request, self._out_of_pages(self._num_pages(len(request.ids)))))
                return
            if not request.num_preemptions:
                request.num_cached_tokens = seq.num_cached_tokens
            request.seq = seq
            request.status = "running"
            self.waiting.remove(request)
            insort(self.running, request, key=_arrival)
            schedule.admitted.append(request)
            start = seq.num_committed
            schedule.works.append(Work(request, seq, start, start + num_tokens, slots))
            budget -= num_tokens

    def _has_room(self, request: Request, num_cached: int) -> bool:
        """Whether all tokens of a request fit beside what running ones still need, and a page for each to grow."""
        available = self._manager.num_free_pages + self._manager.num_evictable_pages
        needed = self._num_pages(len(request.ids)) - self._num_pages(num_cached)
        if not self.running:
            return needed <= available
        for other in self.running:
            assert other.seq is not None  # it runs
            needed += max(self._num_pages(len(other.ids)) - self._num_pages(other.seq.num_tokens), 0) + 1
        return needed + 1 <= available

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
        if leader.status == "running" and leader.num_computed < num_shared:
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
            if other.num_uncomputed <= 1 or not _same_namespace(other, request):
                continue
            num_shared = min(common_prefix_len(request.prompt_array, other.prompt_array), len(request.ids) - 1)
            num_shared = num_shared // page_size * page_size
            if num_shared > most and num_shared > other.num_computed // page_size * page_size:
                best, most = (other, num_shared), num_shared
        return best

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._manager.page_size)


def _arrival(request: Request) -> int:
    return request.id


def _close(request: Request) -> None:
    if request.seq is not None:
        request.seq.close()
        request.seq = None


def _same_namespace(a: Request, b: Request) -> bool:
    return type(a.namespace) is type(b.namespace) and a.namespace == b.namespace
