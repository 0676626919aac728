"""RadixCache under requests of many conversations, evictions and long conversations; the Python core beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from pagedkv import RadixCache
from pagedkv.management import CacheHandle

from ..case import OURS, Case, CaseSpec, Options, WrongResultError

__all__ = ["cases"]

Ids = npt.NDArray[np.int32]

_CAPACITY_TOKENS = 1_000_000
_IN_FLIGHT, _CONVERSATIONS = 64, 300
_SYSTEM, _LONGEST = 1500, 8000
_NUM_REQUESTS, _ROUND_REQUESTS = 10_000, 100


def cases(options: Options) -> Iterator[CaseSpec]:
    """Whole requests (match, lock, evict, insert the prompt, extend by the answer, unlock), and what must not grow."""
    num_requests = 500 if options.quick else _NUM_REQUESTS
    for page_size in (1, 16):
        shape = f"P{page_size}-cap1M-flight{_IN_FLIGHT}-n{num_requests}"
        yield CaseSpec("prefix_cache_request", shape, partial(_requests, page_size, num_requests))
    for num_leaves in (100, 5000) if options.quick else (100, 50_000):
        yield CaseSpec("prefix_cache_evict", f"P1-1page-and-back-leaves{num_leaves}", partial(_evict, num_leaves))
    yield CaseSpec("prefix_cache_match", "P16-6400tokens-100deep", _deep_match)


def _conversations(num_requests: int) -> list[tuple[Ids, Ids]]:
    """Prompts, and each with its answer; most continue an earlier one, and all share what they begin with."""
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> Ids:
        return rng.integers(0, 128_000, rng.integers(low, high), dtype=np.int32)

    system = rng.integers(0, 128_000, _SYSTEM, dtype=np.int32)
    requests: list[tuple[Ids, Ids]] = []
    going: list[Ids] = []
    for _ in range(num_requests):
        history = going.pop(rng.integers(len(going))) if going and rng.random() < 0.6 else None
        prompt = system if history is None else np.concatenate([history, text(50, 1200)])
        if history is None or len(prompt) > _LONGEST:
            prompt = np.concatenate([system, text(500, 5000)])
        full = np.concatenate([prompt, text(50, 600)])
        requests.append((prompt, full))
        going = [*going, full][-_CONVERSATIONS:]
    return requests


class _Server:
    """What an engine does with the cache, and a stack of free pages; goes round and round through the requests."""

    def __init__(self, core: str, page_size: int, requests: list[tuple[Ids, Ids]]) -> None:
        self.cache = RadixCache(page_size, core=core)
        self.page_size, self.requests = page_size, requests
        self.free = np.arange(_CAPACITY_TOKENS // page_size, dtype=np.int32)
        self.num_free = self.free.shape[0]
        self.running: deque[tuple[Ids, CacheHandle]] = deque()
        self.next = self.hit_tokens = 0

    def take(self, num_pages: int) -> Ids:
        if num_pages > self.num_free:
            self.give(self.cache.evict(num_pages - self.num_free))
        self.num_free -= num_pages
        return self.free[self.num_free : self.num_free + num_pages].copy()

    def give(self, pages: Ids) -> None:
        self.free[self.num_free : self.num_free + pages.shape[0]] = pages
        self.num_free += pages.shape[0]

    def serve(self, num_requests: int) -> None:
        for _ in range(num_requests):
            prompt, full = self.requests[self.next % len(self.requests)]
            self.next += 1
            found = self.cache.match(prompt[:-1])
            self.hit_tokens += found.num_tokens
            self.cache.lock(found.handle)
            new = self.take(prompt.shape[0] // self.page_size - found.pages.shape[0])
            result = self.cache.insert(prompt, np.concatenate([found.pages, new]))
            self.give(new[: result.num_cached // self.page_size - found.pages.shape[0]])
            self.cache.lock(result.handle)
            self.cache.unlock(found.handle)
            self.running.append((full, result.handle))
            if len(self.running) == _IN_FLIGHT:
                self.finish(*self.running.popleft())

    def finish(self, full: Ids, handle: CacheHandle) -> None:
        answer = full[handle.num_tokens :]
        pages = self.take(answer.shape[0] // self.page_size)
        result = self.cache.extend(handle, answer, pages)
        self.give(pages[: result.num_cached // self.page_size])
        self.cache.unlock(handle)


def _requests(page_size: int, num_requests: int) -> Case:
    requests = _conversations(num_requests)
    servers = {core: _Server(core, page_size, requests) for core in ("native", "python")}

    def check() -> None:
        """Both come out alike after the first requests, and the cache is full when the timing begins."""
        for server in servers.values():
            server.serve(min(num_requests, 700))
        native, python = servers.values()
        native.cache.sanity_check()
        if (native.hit_tokens, native.free.tolist()) != (python.hit_tokens, python.free.tolist()):
            raise WrongResultError("the two cores give different pages")

    contenders = {OURS: "native", "the Python core": "python"}
    runs = {who: (lambda i, core=core: servers[core].serve(_ROUND_REQUESTS)) for who, core in contenders.items()}
    return Case(runs, check, repeats=_ROUND_REQUESTS)


def _evict(num_leaves: int) -> Case:
    cache = RadixCache(1)
    for leaf in range(num_leaves):
        cache.insert(np.array([0, leaf, leaf], np.int32), np.array([0, 2 * leaf + 1, 2 * leaf + 2], np.int32))
    repeats = 50
    num_evicted = 0

    def ours(i: int) -> None:
        """Frees a page and brings it back under new tokens, so that the tree stays as large."""
        nonlocal num_evicted
        for _ in range(repeats):
            pages = cache.evict(1)
            num_evicted += 1
            cache.insert(np.array([1, num_evicted], np.int32)[1:], pages)

    def check() -> None:
        ours(0)
        cache.sanity_check()
        if cache.num_cached_pages != 2 * num_leaves + 1:
            raise WrongResultError(f"{cache.num_cached_pages} pages are cached, {2 * num_leaves + 1} should be")

    return Case({OURS: ours}, check, repeats=repeats)


def _deep_match() -> Case:
    ids = np.random.default_rng(0).integers(0, 128_000, 6400, dtype=np.int32)
    pages = np.arange(400, dtype=np.int32)
    caches = {OURS: RadixCache(16), "the Python core": RadixCache(16, core="python")}
    for cache in caches.values():
        for num_pages in range(4, 401, 4):
            cache.insert(ids[: 16 * num_pages], pages[:num_pages])
    repeats = 20

    def check() -> None:
        for cache in caches.values():
            if cache.match(ids).pages.tolist() != pages.tolist() or sum(1 for _ in cache.nodes()) != 101:
                raise WrongResultError("100 turns must be 100 nodes with their pages")

    runs = {who: (lambda i, cache=cache: [cache.match(ids) for _ in range(repeats)]) for who, cache in caches.items()}
    return Case(runs, check, repeats=repeats)
