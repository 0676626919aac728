"""Interrupts anywhere in the Python around a core, and policies that raise: the cache works on and loses nothing."""

import random
import sys

import pytest

from pagedkv import RadixCache
from pagedkv.management import (
    events,
    eviction,
    native_radix_tree,
    python_radix_tree,
    radix_cache,
    radix_node,
    radix_tree,
)
from pagedkv.management.events import AllBlocksCleared, BlockStored

BOTH_CORES = pytest.mark.parametrize("core", ["python", pytest.param("native", marks=pytest.mark.native)])

FILES = {module.__file__ for module in (events, native_radix_tree, radix_cache, radix_tree)}
PYTHON_CORE = {module.__file__ for module in (eviction, python_radix_tree, radix_node)}


class Interrupt:
    """Raises KeyboardInterrupt before the bytecode of this number that runs in `files`."""

    def __init__(self, number, files=FILES):
        self.num_left, self.files = number, files

    @property
    def has_come(self):
        return self.num_left <= 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *error):
        sys.settrace(self.before)

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.num_left -= 1
            if self.num_left == 0:
                raise KeyboardInterrupt
        return self.trace


class OfTheUser:
    def priority(self, run):
        return (run.last_access,)


class Story:
    """A cache, a few calls on it, and what a reader of its events believes."""

    def __init__(self, core, policy, with_events):
        self.cache = cache = RadixCache(2, policy, events=with_events, core=core)
        self.lost, self.believed = False, set()
        self.given, self.returned = {0, 1, 9}, set()
        self.handle = cache.insert([1, 2, 3, 4], [0, 1]).handle
        cache.insert([9, 9], [9], "other")
        cache.lock(self.handle)
        self.calls = [
            self.insert,
            self.extend,
            self.unlock,
            self.match,
            self.evict,
            self.take,
            self.ancestor,
            self.evict,
        ]

    def insert(self):
        self.given |= {2, 3, 4}
        self.cache.insert([1, 2, 5, 6, 7, 8], [2, 3, 4], "new")

    def extend(self):
        self.given |= {5}
        self.cache.extend(self.handle, [7, 7], [5])

    def unlock(self):
        self.cache.unlock(self.handle)

    def match(self):
        self.cache.match([1, 2, 5, 6], "new")

    def ancestor(self):
        self.cache.ancestor(self.cache.match([1, 2, 3, 4]).handle, 2)

    def evict(self):
        self.lost = True
        self.returned |= set(self.cache.evict(4).tolist())
        self.lost = False

    def take(self):
        log = self.cache.events
        if log is None:
            return
        taken = []
        try:
            taken = log.take()
        except KeyboardInterrupt:
            log.resync()
            raise
        read(taken, self.believed)

    def run(self, interrupt):
        """Calls until the interrupt comes out."""
        for call in self.calls:
            try:
                with interrupt:
                    call()
            except KeyboardInterrupt:
                return

    def check(self):
        """The pages that came are in the cache or were returned, or are those of an answer that was lost."""
        cache = self.cache
        cache.sanity_check()
        held = {page for node in cache.nodes() for page in node.pages.tolist()}
        assert not held & self.returned
        assert cache.num_cached_pages == len(held)
        missing = self.given - held - self.returned
        assert self.lost or missing in (set(), {2, 3, 4}, {5})
        self.take()
        if cache.events is not None:
            assert self.believed == hashes_in(cache)


def read(taken, believed):
    """What a reader does with events, in order; refuses those that name what it was not told of."""
    for event in taken:
        if isinstance(event, AllBlocksCleared):
            believed.clear()
        elif isinstance(event, BlockStored):
            assert event.parent_block_hash is None or event.parent_block_hash in believed
            assert not believed & set(event.block_hashes)
            believed |= set(event.block_hashes)
        else:
            assert believed >= set(event.block_hashes)
            believed -= set(event.block_hashes)


def hashes_in(cache):
    """The hashes of all that is cached, from the nodes alone."""
    log = events.EventLog()
    namespaces = {}
    for node in cache.nodes():
        above = node.parent
        namespaces[node] = node.namespace if above is None else namespaces[above]
        if above is not None:
            last = int(above.pages[-1]) if above.parent is not None else None
            log.stored(last, node.pages, node.tokens, namespaces[node], cache.page_size)
    return {value for event in log.take() for value in event.block_hashes}


@BOTH_CORES
@pytest.mark.parametrize(
    "policy, with_events", [("lru", False), ("lru", True), (OfTheUser(), True)], ids=["silent", "events", "of-the-user"]
)
def test_an_interrupt_at_any_bytecode_leaves_a_cache_that_works_on(core, policy, with_events):
    for number in range(1, 10**6):
        story, interrupt = Story(core, policy, with_events), Interrupt(number)
        story.run(interrupt)
        story.check()
        cache = story.cache
        for namespace, pages in (("new", [50, 51]), ("newer", [60, 61])):
            assert cache.insert([70, 71, 72, 73], pages, namespace).num_cached == 0
            assert cache.match([70, 71, 72, 73], namespace).pages.tolist() == pages
        story.given |= {50, 51, 60, 61}
        story.check()
        num_evictable = cache.num_evictable_pages
        assert cache.evict(99).size == num_evictable
        story.lost = True
        story.check()
        cache.reset(force=True)
        assert (cache.num_cached_pages, list(cache.nodes())) == (0, [])
        cache.insert([1, 2], [0])
        story.given, story.returned = {0}, set()
        story.check()
        if not interrupt.has_come:
            break
    assert number > 400


@BOTH_CORES
def test_an_interrupt_in_a_reset_leaves_one_that_succeeds(core):
    for number in range(1, 10**6):
        story, interrupt = Story(core, "lru", True), Interrupt(number)
        story.lost = True
        try:
            with interrupt:
                story.cache.reset(force=True)
        except KeyboardInterrupt:
            story.check()
            story.cache.reset(force=True)
        assert story.cache.num_cached_pages == 0
        story.check()
        assert story.believed == set()
        if not interrupt.has_come:
            break
    assert number > 50


def test_an_interrupt_inside_the_python_core_leaves_one_that_can_be_reset():
    """Whatever the books say then: every seventh bytecode."""
    for number in range(1, 10**6, 7):
        story, interrupt = Story("python", "lru", True), Interrupt(number, PYTHON_CORE)
        story.run(interrupt)
        cache, locked = story.cache, story.handle
        cache.reset(force=True)
        assert (cache.num_cached_pages, cache.num_evictable_pages, list(cache.nodes())) == (0, 0, [])
        for call in (cache.lock, cache.unlock):
            with pytest.raises(ValueError, match="handle must"):
                call(locked)
        cache.lock(cache.insert([1, 2, 3, 4], [0, 1]).handle)
        story.given, story.returned, story.lost = {0, 1}, set(), False
        story.check()
        if not interrupt.has_come:
            break
    assert number > 1000


class Moody:
    """Oldest first, and raises `error` for runs of `num_pages` pages."""

    def __init__(self, error, num_pages):
        self.error, self.num_pages = error, num_pages

    def priority(self, run):
        if run.num_pages == self.num_pages and self.error is not None:
            raise self.error
        return (run.last_access,)


@BOTH_CORES
def test_a_policy_that_raises_in_an_eviction_loses_no_page(core):
    """What was dropped before is returned; the next call raises, and drops nothing."""
    policy = Moody(None, 2)
    cache = RadixCache(1, policy, events=True, core=core)
    cache.insert([1, 2, 3], [0, 1, 2])
    cache.insert([1, 2, 4], [0, 1, 3])
    policy.error = TypeError("in a bad mood")
    # When both ends are gone, the two pages before them are asked about.
    assert sorted(cache.evict(4).tolist()) == [2, 3]
    cache.sanity_check()
    for _ in range(2):
        with pytest.raises(TypeError, match="in a bad mood"):
            cache.evict(4)
        assert (cache.num_cached_pages, cache.num_evictable_pages) == (2, 2)
    policy.error = None
    assert cache.evict(4).tolist() == [0, 1]
    cache.sanity_check()
    assert cache.events.num_pages == 0


@BOTH_CORES
@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError])
def test_a_policy_that_raises_elsewhere_is_asked_again_by_the_eviction(core, kind):
    policy = Moody(kind("moody"), 1)
    cache = RadixCache(1, policy, core=core)
    handle = cache.insert([1], [0]).handle
    cache.insert([2, 2], [1, 2])
    cache.lock(handle)
    cache.unlock(handle)
    assert cache.match([1]).pages.tolist() == [0]
    cache.sanity_check()
    with pytest.raises(kind, match="moody"):
        cache.evict(1)
    policy.error = None
    assert [cache.evict(1).tolist() for _ in range(3)] == [[2], [1], [0]]


@BOTH_CORES
def test_an_interrupt_inside_a_policy_comes_out(core):
    policy = Moody(None, 1)
    cache = RadixCache(1, policy, core=core)
    cache.insert([1], [0])
    policy.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        cache.match([1])
    with pytest.raises(KeyboardInterrupt):
        cache.evict(1)
    policy.error = None
    assert cache.reset(force=True).size <= 1
    cache.insert([1], [0])
    cache.sanity_check()


@pytest.mark.native
def test_a_moody_policy_has_equal_effects_in_both_cores():
    for seed in range(20):
        rng, policy = random.Random(seed), Moody(ValueError("moody"), 1 + seed % 4)
        caches = [RadixCache(1, policy, core=core) for core in ("python", "native")]
        free = list(range(60))
        for _ in range(120):
            ids, num_pages = [rng.randrange(2) for _ in range(rng.randrange(6))], rng.randrange(6)
            is_evict = rng.random() < 0.4 or len(free) < 6
            results = []
            for cache in caches:
                try:
                    answer = cache.evict(num_pages) if is_evict else cache.insert(ids, free[: len(ids)])
                    results.append(answer.tolist() if is_evict else answer.num_cached)
                except ValueError as error:
                    results.append(str(error))
                cache.sanity_check()
            assert results[0] == results[1]
            if isinstance(results[0], list):
                free += results[0]
            elif not is_evict:
                free = free[: results[0]] + free[len(ids) :]
