"""Who computes which tokens in a step, and who gives pages back when there are none left."""

from __future__ import annotations

from bisect import insort

from ..errors import OutOfPagesError
from ..kernels.compare_key import common_prefix_len
from ..management.manager import KVCacheManager
from ..management.sequence import Sequence
from .page_needs import num_pages_in_all, num_pages_to_come
from .request import Request
from .schedule import Schedule, Work, due_works, reserve, within

__all__ = ["Scheduler"]


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
        """The work of the next step, reserved together. Nothing is reserved, and nobody admitted, when it raises."""
        schedule = Schedule()
        due = [work for request in self.running for work in due_works(request)]
        schedule.works = within(due, self._max_batch_tokens)
        try:
            if self.waiting:
                self._admit(schedule)
            self._reserve(schedule)
        except BaseException:
            for request in [*schedule.admitted, *self.waiting]:
                if request.live[0].seq is not None:
                    self._put_back(request)
            raise
        return schedule

    def put_all_back(self) -> None:
        """After an interrupt, wherever it came: all requests wait, and nobody has pages."""
        for request in list(self.running):
            self._preempt(request)
        for request in self.waiting:
            request.give_pages_back()
        self._leaders.clear()

    def _reserve(self, schedule: Schedule) -> None:
        """Reserves for all works; the newest running requests give their pages back until those of the others fit."""
        while schedule.works:
            try:
                schedule.batch = reserve(self._manager, schedule.works)
                return
            except OutOfPagesError as error:
                newest = self.running[-1]
                if len(self.running) == 1 and newest in schedule.admitted:
                    # Whoever has the pages is not one of ours. What ran before may need a copy now, and be admitted.
                    schedule.failed.append((newest, error))
                    schedule.works = []
                    return
            self._preempt(newest)
            schedule.preempted.append(newest)
            schedule.works = [work for work in schedule.works if work.request is not newest]

    def _preempt(self, request: Request) -> None:
        self._put_back(request)
        request.num_preemptions += 1

    def _put_back(self, request: Request) -> None:
        request.give_pages_back()
        # In an order in which an interrupt leaves it in a list.
        request.status = "waiting"
        if request not in self.waiting:
            self.add(request)
        if request in self.running:
            self.running.remove(request)

    def _admit(self, schedule: Schedule) -> None:
        """Puts waiting requests, and their first works, behind those that run."""
        budget = self._max_batch_tokens - sum(work.num_tokens for work in schedule.works)
        num_seqs = sum(len(request.live) for request in self.running)
        for request in list(self.waiting):
            if budget <= 0 or num_seqs >= self.max_num_seqs:
                return
            if self._follows(request):
                continue
            if num_seqs + len(request.live) > self.max_num_seqs:
                return
            # Without the last token: its logits are needed, so it is computed even when it is cached.
            trunk, stop = request.live[0], request.num_shared
            trunk.seq = seq = self._manager.open(trunk.ids[: stop - 1], request.namespace)
            leader = self._leader(request, seq.num_tokens)
            if leader is not None:
                trunk.close()
                self._leaders[request.id] = leader
                continue
            if not self._has_room(request, seq, schedule.works):
                trunk.close()
                if not self.running:
                    # Nobody runs, so nobody will make room: somebody else holds pages of this manager.
                    needed = num_pages_in_all(request, self._manager.page_size)
                    schedule.failed.append((request, self._out_of_pages(needed)))
                return
            if not request.num_preemptions:
                request.num_cached_tokens = seq.num_cached_tokens
            schedule.admitted.append(request)
            insort(self.running, request, key=_arrival)
            self.waiting.remove(request)
            request.status = "running"
            start = seq.num_tokens
            work = Work(trunk, seq, start, min(stop, start + budget))
            schedule.works.append(work)
            budget -= work.num_tokens
            num_seqs += len(request.live)

    def _has_room(self, request: Request, seq: Sequence, works: list[Work]) -> bool:
        """Whether all tokens of a request fit beside what running ones still need, and a page for each continuation to
        grow. Neither the works chosen so far nor `seq`, opened for the request, have pages for their tokens yet."""
        manager, page_size = self._manager, self._manager.page_size
        needed = num_pages_in_all(request, page_size) - self._num_pages(seq.num_tokens)
        if self.running:
            needed += sum(num_pages_to_come(other, page_size) for other in self.running) + len(request.live)
        available = manager.num_free_pages + manager.num_evictable_pages
        # Each work may have a page to copy besides. Only where that decides the manager has to look at all of them.
        if not needed <= available < needed + len(works):
            return needed <= available
        needed -= sum(self._num_pages(work.stop) - self._num_pages(work.start) for work in works)
        counts = [*(work.num_tokens for work in works), needed * page_size]
        return manager.can_batch([*(work.seq for work in works), seq], counts)

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


def _same_namespace(a: Request, b: Request) -> bool:
    return type(a.namespace) is type(b.namespace) and a.namespace == b.namespace
