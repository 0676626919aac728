"""Random programs, held against a model after every call: results, counters, events, and what goes first."""

from __future__ import annotations

import random
import zlib
from typing import Any

from ...management.events import AllBlocksCleared, BlockStored
from ...management.eviction import make_eviction_policy
from .case import Check, World, equal, refused
from .event_cases import hashes_of
from .model import Prefix, PrefixModel

__all__ = ["TRACE_CHECKS"]

NAMESPACES = (None, "", "a")
NUM_CALLS = 250


class _Trace:
    """A cache and its model, driven by the same calls; `hashes` is what a router believes to be cached."""

    def __init__(self, world: World, policy: str) -> None:
        self.world = world
        self.random = random.Random(zlib.crc32(f"{policy}-{world.page_size}".encode()))
        self.cache = world.cache(eviction=policy, events=True)
        self.model = PrefixModel(make_eviction_policy(policy))
        self.free = list(range(60))
        self.handles: list[tuple[Prefix, Any]] = []
        self.hashes: set[int] = set()
        self._hash_of: dict[Prefix, int] = {}

    def prefix(self) -> Prefix:
        word = "".join(self.random.choices("aAb", weights=(4, 1, 2), k=self.random.randrange(8)))
        return Prefix(self.random.choice(NAMESPACES), word)

    def match(self) -> None:
        asked = self.prefix()
        wanted = self.model.match(asked)
        pages = self.world.found(self.cache, asked.word, asked.namespace)
        equal(f"pages of {asked}", pages, [self.model.pages[start].page for start in wanted.starts()])

    def insert(self) -> None:
        asked, only_new, priority = self.prefix(), self.random.random() < 0.3, self.random.randrange(-1, 2)
        if len(asked.word) > len(self.free):
            return
        # Pages of what is there are not looked at: any will do, even one that the cache holds.
        pages = self.random.sample(self.free, len(asked.word))
        options = {"only_new": only_new, "priority": priority}
        result = self.world.insert(self.cache, asked.word, pages, asked.namespace, **options)
        named = self.follow(asked, 0, pages, options, result)
        if len(self.handles) <= 5 and self.random.random() < 0.4:
            self.lock(named, result.handle)

    def extend(self) -> None:
        if not self.handles:
            return
        number = self.random.randrange(len(self.handles))
        start, handle = self.handles[number]
        more = self.prefix().word
        if not start.word or len(more) > len(self.free):
            return
        options = {"only_new": self.random.random() < 0.7, "priority": self.random.randrange(-1, 2)}
        pages = self.random.sample(self.free, len(more))
        result = self.world.extend(self.cache, handle, more, pages, **options)
        whole = Prefix(start.namespace, start.word + more)
        named = self.follow(whole, len(start.word), pages, options, result)
        self.lock(named, result.handle)
        self.unlock(number)

    def follow(self, whole: Prefix, num_before: int, pages: list[int], options: Any, result: Any) -> Prefix:
        """Does in the model what an insert or an extension behind `num_before` pages did, and compares.

        Returns what the handle of the result names.
        """
        there = self.model.find(whole)
        num_cached = len(there.word) - num_before
        named = there if options["only_new"] and num_cached else whole
        taken = pages[num_cached:] if named is whole else []
        self.model.insert(named, taken, options["priority"])
        self.free = [page for page in self.free if page not in taken]
        equal(f"num_cached of {whole}", result.num_cached, num_cached * self.world.page_size)
        equal(f"tokens of the handle of {whole}", result.handle.num_tokens, self.world.num_tokens(named.word))
        return named

    def lock_found(self) -> None:
        if len(self.handles) > 5:
            return
        asked = self.prefix()
        self.lock(self.model.match(asked), self.world.handle(self.cache, asked.word, asked.namespace))

    def lock_start(self) -> None:
        if 1 <= len(self.handles) <= 5:
            prefix, handle = self.random.choice(self.handles)
            length = self.random.randint(0, len(prefix.word))
            start = self.cache.ancestor(handle, length * self.world.page_size)
            self.lock(Prefix(prefix.namespace, prefix.word[:length]), start)

    def lock(self, prefix: Prefix, handle: Any) -> None:
        self.cache.lock(handle)
        self.model.locks[prefix] += 1
        self.handles.append((prefix, handle))

    def unlock_one(self) -> None:
        if not self.handles:
            return
        number = self.random.randrange(len(self.handles))
        prefix, handle = self.handles[number]
        self.unlock(number)
        if prefix.word and not self.model.locks[prefix]:
            with refused("handle must be locked"):
                self.cache.unlock(handle)

    def unlock(self, number: int) -> None:
        prefix, handle = self.handles.pop(number)
        self.cache.unlock(handle)
        self.model.locks[prefix] -= 1
        self.model.use(prefix)

    def evict(self) -> None:
        num_pages = self.random.choice((0, 1, 1, 1, 1, 2, 2, 5))
        wanted = self.model.evict(num_pages)
        equal("pages evicted", sorted(self.cache.evict(num_pages).tolist()), sorted(wanted))
        self.free += wanted

    def reset(self) -> None:
        if self.model.locked():
            with refused("the cache must not be locked to be reset"):
                self.cache.reset()
            return
        wanted = sorted(self.model.evict(100))
        equal("pages of a reset", sorted(self.cache.reset().tolist()), wanted)
        self.free += wanted

    def check(self) -> None:
        """Compares all that can be seen without a use of the cache."""
        model, cache = self.model, self.cache
        equal("num_cached_pages", cache.num_cached_pages, len(model.pages))
        equal("num_evictable_pages", cache.num_evictable_pages, len(model.pages) - len(model.locked()))
        equal("pages held", cache.held_mask(60).nonzero()[0].tolist(), sorted(it.page for it in model.pages.values()))
        for prefix, handle in self.handles:
            tokens = self.world.ids(prefix.word).tolist()
            equal(f"tokens of the handle of {prefix}", cache.locked_tokens(handle, 0).tolist(), tokens)
        self.read_events()
        equal("hashes that a router knows", self.hashes, {self.hash_of(prefix) for prefix in model.pages})

    def hash_of(self, prefix: Prefix) -> int:
        if prefix not in self._hash_of:
            self._hash_of[prefix] = hashes_of(self.world, prefix.word, prefix.namespace)[-1]
        return self._hash_of[prefix]

    def read_events(self) -> None:
        for event in self.cache.events.take():
            if isinstance(event, AllBlocksCleared):
                self.hashes.clear()
            elif isinstance(event, BlockStored):
                is_known = event.parent_block_hash is None or event.parent_block_hash in self.hashes
                equal("the parent is known", is_known, True)
                equal("hashes stored that were there", self.hashes & set(event.block_hashes), set())
                self.hashes |= set(event.block_hashes)
            else:
                equal("hashes removed that were not there", set(event.block_hashes) - self.hashes, set())
                self.hashes -= set(event.block_hashes)


def _random_calls(world: World, policy: str) -> None:
    trace = _Trace(world, policy)
    calls = [trace.match, trace.insert, trace.lock_found, trace.lock_start, trace.unlock_one, trace.evict]
    if policy in ("lru", "mru"):
        # A cache may count what a run grows by as old as the run, and as often hit.
        calls.append(trace.extend)
    for number in range(NUM_CALLS):
        call = trace.reset if trace.random.random() < 0.02 else trace.random.choice(calls)
        try:
            call()
            trace.check()
        except Exception as error:
            raise AssertionError(f"call {number} of the random calls, {call.__name__}: {error}") from error


def _check(policy: str) -> Check:
    def check(world: World) -> None:
        _random_calls(world, policy)

    check.__name__ = f"random_calls_{policy}"
    return check


TRACE_CHECKS: list[Check] = [_check(policy) for policy in ("lru", "lfu", "fifo", "mru", "filo", "slru", "priority")]
