"""Random programs on a hashed cache with a window, held against a dictionary of prefixes after every step."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pagedkv import IntegrityError
from pagedkv.management.events import AllBlocksCleared, BlockStored
from pagedkv.management.eviction import eviction_policies, make_eviction_policy
from pagedkv.management.hashed_cache import HashedPageCache
from pagedkv.management.page_hash import digest_pages, namespace_digest, sha256, short_hash

NAMESPACES = [None, "a"]
NUM_PAGES = 40
LOWEST = -(2**63)


def one_bit(data):
    """Two lists that every page of every prompt is in."""
    return b"1" if sha256(data)[0] > 127 else b"0"


@dataclass(eq=False)
class Entry:
    """One cached page and what a policy may look at."""

    page: int
    position: int
    created: int
    last_access: int
    num_hits: int = 0
    priority: int = LOWEST
    num_pages: int = 1
    is_evictable: bool = True


@dataclass(eq=False)
class Named:
    """A prefix that a handle names: which, when, and the entries that it needed then."""

    key: tuple
    time: int
    needed: list
    handle: object


class WindowModel:
    """Pages by the namespace and all tokens up to their end."""

    def __init__(self, page_size, window, policy):
        self.page_size, self.window, self.policy = page_size, window, policy
        self.pages = {}
        self.locked = Counter()
        self.time = 0

    def up_to(self, key, num_pages):
        return key[0], key[1][: num_pages * self.page_size]

    def positions(self, num_tokens):
        return range(max(0, num_tokens - self.window + 1) // self.page_size, num_tokens // self.page_size)

    def needed(self, key):
        """The entries that a prefix needs, None for one that is missing."""
        return [self.at(key, position) for position in self.positions(len(key[1]))]

    def at(self, key, position):
        return self.pages.get(self.up_to(key, position + 1))

    def longest(self, key):
        return next(
            shorter
            for num_pages in range(len(key[1]) // self.page_size, -1, -1)
            if None not in self.needed(shorter := self.up_to(key, num_pages))
        )

    def use(self, entries, num_hits=0, priority=LOWEST):
        self.time += 1
        for entry in entries:
            entry.last_access = self.time
            entry.num_hits += num_hits
            entry.priority = max(entry.priority, priority)

    def add(self, key, start, pages, only_new, priority):
        """What an insert of `pages` for the positions from `start` on did: pages there, taken, and the prefix named."""
        total = start + len(pages)
        is_there = [self.at(key, position) is not None for position in range(start, total)]
        num_there = [*is_there, False].index(False)
        num_gone = next((number for number, page in enumerate(pages) if page >= 0), len(pages))
        first = max(num_there, num_gone)
        stop = next((number for number in range(first, len(pages)) if is_there[number]), len(pages))
        named = self.up_to(key, start + num_there)
        gap = [
            position
            for position in self.positions((start + stop) * self.page_size)
            if position < start + first and self.at(key, position) is None
        ]
        taken = []
        if first < stop and not gap and not (only_new and is_there[num_gone]):
            taken = pages[first:stop]
            self.time += 1
            for position, page in enumerate(taken, start + first):
                entry = Entry(page, position, self.time, self.time, priority=priority)
                self.pages[self.up_to(key, position + 1)] = entry
            named = self.up_to(key, start + stop)
        self.use(self.needed(named), priority=priority)
        return num_there, taken, named

    def protected(self):
        """Each page that handles protect, as often as they do."""
        counts = Counter()
        for key, times in self.locked.items():
            for position in self.positions(len(key[1])):
                counts[self.up_to(key, position + 1)] += times
        return +counts

    def evict(self, num_pages):
        dropped = []
        protected = self.protected()
        while len(dropped) < num_pages and len(self.pages) > len(protected):
            first = min(
                (key for key in self.pages if key not in protected),
                key=lambda key: (*self.policy.priority(self.pages[key]), -self.pages[key].position),
            )
            dropped.append(self.pages.pop(first).page)
        return dropped[::-1]


class WindowMachine(RuleBasedStateMachine):
    # What a planted defect takes the place of.
    make = HashedPageCache

    @initialize(
        page_size=st.sampled_from([1, 2, 3]),
        window=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 30]),
        eviction=st.sampled_from(["lru", *eviction_policies()]),
        page_hash=st.sampled_from([sha256, one_bit]),
    )
    def begin(self, page_size, window, eviction, page_hash):
        self.page_size = page_size
        self.cache = type(self).make(page_size, eviction, page_hash=page_hash, events=True, window=window)
        self.model = WindowModel(page_size, window, make_eviction_policy(eviction))
        self.free = list(range(NUM_PAGES))
        self.handles, self.locked = [], []
        self.hashes = set()

    def key(self, word, namespace):
        return namespace, tuple(token for letter in word for token in [ord(letter)] * self.page_size)

    def keep(self, key, handle):
        assert handle.num_tokens == len(key[1])
        if key[1]:
            self.handles.append(Named(key, self.model.time, self.model.needed(key), handle))
            del self.handles[:-8]

    def is_current(self, named):
        return all(then is now for then, now in zip(named.needed, self.model.needed(named.key), strict=True))

    words = st.tuples(st.sampled_from(["", "ab", "abab", "ababaabb"]), st.text("ab", max_size=4)).map("".join)

    @rule(word=words, namespace=st.sampled_from(NAMESPACES), num_more=st.integers(0, 2))
    def match(self, word, namespace, num_more):
        key = self.key(word, namespace)
        wanted = self.model.longest(key)
        needed = self.model.needed(wanted)
        self.model.use(needed, num_hits=1)
        found = self.cache.match([*key[1], *[7] * min(num_more, self.page_size - 1)], namespace)
        assert found.num_tokens == len(wanted[1])
        gone = [-1] * (len(wanted[1]) // self.page_size - len(needed))
        assert found.pages.tolist() == gone + [entry.page for entry in needed]
        self.keep(wanted, found.handle)

    @rule(
        word=words,
        namespace=st.sampled_from(NAMESPACES),
        num_gone=st.integers(0, 3),
        only_new=st.booleans(),
        priority=st.integers(-1, 1),
    )
    def insert(self, word, namespace, num_gone, only_new, priority):
        self.add(self.key(word, namespace), 0, num_gone, only_new, priority)

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), word=words, num_gone=st.sampled_from([0, 0, 1]), only_new=st.booleans())
    def extend(self, data, word, num_gone, only_new):
        named = data.draw(st.sampled_from(self.handles + [lock for lock in self.locked if lock.key[1]]))
        key = named.key[0], named.key[1] + self.key(word, None)[1]
        if self.is_current(named):
            self.add(key, len(named.key[1]) // self.page_size, num_gone, only_new, 0, named.handle)
        else:
            with pytest.raises(ValueError, match="handle must name a prefix that is still cached"):
                self.cache.extend(named.handle, [], [])

    def add(self, key, start, num_gone, only_new, priority, handle=None):
        num_pages = len(key[1]) // self.page_size - start
        num_gone = min(num_gone, num_pages)
        if num_pages - num_gone > len(self.free):
            return
        pages = [-1] * num_gone + self.free[: num_pages - num_gone]
        options = {"only_new": only_new, "priority": priority}
        if handle is None:
            result = self.cache.insert(key[1], pages, key[0], **options)
        else:
            result = self.cache.extend(handle, key[1][start * self.page_size :], pages, **options)
        num_there, taken, named = self.model.add(key, start, pages, only_new, priority)
        self.free = [page for page in self.free if page not in taken]
        assert result.num_cached == num_there * self.page_size
        self.keep(named, result.handle)

    @precondition(lambda self: self.handles and len(self.locked) < 7)
    @rule(data=st.data(), times=st.integers(1, 2))
    def lock(self, data, times):
        # The last handle more often: a sequence locks what it has just extended.
        named = data.draw(st.sampled_from([*self.handles, *self.handles[-1:] * 4]))
        for _ in range(times):
            if self.is_current(named):
                self.cache.lock(named.handle)
                self.model.locked[named.key] += 1
                self.locked.append(named)
            else:
                with pytest.raises(ValueError, match="handle must name a prefix that is still cached"):
                    self.cache.lock(named.handle)

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data):
        named = self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))
        self.cache.unlock(named.handle)
        self.model.locked[named.key] -= 1
        self.model.use(self.model.needed(named.key))
        if not self.model.locked[named.key] and self.model.window > 1:
            with pytest.raises(ValueError, match="handle must be locked"):
                self.cache.unlock(named.handle)

    @precondition(lambda self: self.locked)
    @rule(data=st.data(), num_pages=st.integers(1, 3), only_new=st.booleans())
    def move_on(self, data, num_pages, only_new):
        """What a running sequence does: publishes, locks what came of it, unlocks what it had."""
        named = data.draw(st.sampled_from(self.locked))
        if num_pages > len(self.free):
            return
        word = data.draw(st.text("ab", min_size=num_pages, max_size=num_pages))
        key = named.key[0], named.key[1] + self.key(word, None)[1]
        self.add(key, len(named.key[1]) // self.page_size, 0, only_new, 0, named.handle)
        longer = self.handles[-1]
        self.cache.lock(longer.handle)
        self.model.locked[longer.key] += 1
        self.locked.append(longer)
        self.cache.unlock(named.handle)
        self.locked.remove(named)
        self.model.locked[named.key] -= 1
        self.model.use(self.model.needed(named.key))

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def ancestor(self, data):
        named = data.draw(st.sampled_from(self.handles + self.locked))
        num_pages = data.draw(st.integers(0, len(named.key[1]) // self.page_size))
        num_tokens = num_pages * self.page_size
        if not self.is_current(named):
            with pytest.raises(ValueError, match="handle must name a prefix that is still cached"):
                self.cache.ancestor(named.handle, num_tokens)
            return
        shorter = self.model.up_to(named.key, num_pages)
        needed = self.model.needed(shorter)
        if any(entry is None or entry.created > named.time for entry in needed):
            with pytest.raises(ValueError, match="num_tokens must be a prefix whose last .* are still cached"):
                self.cache.ancestor(named.handle, num_tokens)
            return
        handle = self.cache.ancestor(named.handle, num_tokens)
        assert self.cache.locked_tokens(handle, 0).tolist() == list(shorter[1])
        if num_pages:
            self.handles.append(Named(shorter, named.time, needed, handle))

    @rule(num_pages=st.sampled_from([0, 1, 1, 2, 3, 5, 9]))
    def evict(self, num_pages):
        wanted = self.model.evict(num_pages)
        assert self.cache.evict(num_pages).tolist() == wanted
        self.free += wanted

    @rule(is_likely=st.integers(0, 9))
    def reset(self, is_likely):
        if is_likely < 8:
            return
        if self.model.protected():
            with pytest.raises(ValueError, match="the cache must not be locked to be reset"):
                self.cache.reset()
            return
        pages = self.cache.reset().tolist()
        assert sorted(pages) == sorted(entry.page for entry in self.model.pages.values())
        self.free += pages
        self.model.pages.clear()

    @invariant()
    def agrees(self):
        if not hasattr(self, "cache"):
            return
        model, cache = self.model, self.cache
        cache.sanity_check()
        protected = model.protected()
        assert (cache.num_cached_pages, cache.num_evictable_pages) == (
            len(model.pages),
            len(model.pages) - len(protected),
        )
        held = sorted(entry.page for entry in model.pages.values())
        assert cache.held_mask(NUM_PAGES).nonzero()[0].tolist() == held
        assert np.flatnonzero(cache.holds(np.arange(NUM_PAGES))).tolist() == held
        for named in self.locked:
            assert cache.locked_tokens(named.handle, 0).tolist() == list(named.key[1])
        known = {model.up_to(key, number) for key in model.pages for number in range(1, len(key[1]) + 1)}
        assert len(list(cache._table.pages())) == len(known)
        self.read_events()
        assert self.hashes == {self.hash_of(key) for key in model.pages}
        self.read_nodes(protected)

    def hash_of(self, key):
        return short_hash(digest_pages(namespace_digest(key[0]), np.array(key[1]), self.page_size)[-1])

    def read_events(self):
        for event in self.cache.events.take():
            if isinstance(event, AllBlocksCleared):
                self.hashes.clear()
            elif isinstance(event, BlockStored):
                assert not self.hashes & set(event.block_hashes)
                self.hashes |= set(event.block_hashes)
                assert event.parent_block_hash in {None} | {
                    self.hash_of(self.model.up_to(key, number))
                    for key in self.model.pages
                    for number in range(1, len(key[1]) // self.page_size)
                }
            else:
                assert set(event.block_hashes) <= self.hashes
                self.hashes -= set(event.block_hashes)

    def read_nodes(self, protected):
        """Each run is where its parent and what is missing between them say, and tells its locks."""
        ends = {}
        pages = []
        by_page = {entry.page: (key, entry) for key, entry in self.model.pages.items()}
        for run in self.cache.nodes():
            if run.parent is None:
                ends[id(run)] = 0
                continue
            start = ends[id(run.parent)] + run.num_missing
            ends[id(run)] = start + run.num_pages
            pages += run.pages.tolist()
            keys = [by_page[page][0] for page in run.pages.tolist()]
            assert [len(key[1]) // self.page_size for key in keys] == list(range(start + 1, start + run.num_pages + 1))
            assert run.tokens.tolist() == list(keys[-1][1][start * self.page_size :])
            assert {protected[key] for key in keys} == {run.locks}
            # A window of one token needs no page, so its locks are not at pages.
            assert run.anchors == self.model.locked[keys[-1]] or self.model.window == 1
            assert run.is_evictable == (run.locks == 0)
        assert sorted(pages) == sorted(by_page)


WindowMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestWindowMachine = WindowMachine.TestCase


class ForgetsWhatIsBehind(HashedPageCache):
    """Looks no further than the first page that has left."""

    def _longest_whole(self, chain):
        num_there = next((number for number, page in enumerate(chain) if page.page < 0), len(chain))
        return super()._longest_whole(chain[:num_there])


class NeedsOnePageLess(HashedPageCache):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._window_pages = max(1, self._window_pages - 1)


class TakesWhatIsThere(HashedPageCache):
    """Goes on behind a page that is there."""

    def _positions_to_take(self, chain, num_cached, pages):
        return super()._positions_to_take(chain[:num_cached], num_cached, pages)


class TakesWhatIsOfNoUse(HashedPageCache):
    def _positions_to_take(self, chain, num_cached, pages):
        first = max(num_cached, next((number for number, page in enumerate(pages) if page >= 0), len(pages)))
        stop = next((number for number in range(first, len(chain)) if chain[number].page >= 0), len(pages))
        return first, stop


class UnlockIsNoUse(HashedPageCache):
    def _unlock_in_window(self, page):
        use, self._use_pages = self._use_pages, lambda pages: None
        super()._unlock_in_window(page)
        self._use_pages = use


class AnyHandleIsCurrent(HashedPageCache):
    def _is_whole(self, page, time):
        return super()._is_whole(page, 2**40)


class FirstPagesFirst(HashedPageCache):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        policy = self._policy
        self._queue.policy = type("Plain", (), {"priority": lambda self, run: (*policy.priority(run), run.position)})()


@pytest.mark.parametrize(
    "planted",
    [
        ForgetsWhatIsBehind,
        NeedsOnePageLess,
        TakesWhatIsThere,
        TakesWhatIsOfNoUse,
        UnlockIsNoUse,
        AnyHandleIsCurrent,
        FirstPagesFirst,
    ],
)
def test_random_programs_find(planted, monkeypatch):
    monkeypatch.setattr(WindowMachine, "make", planted)
    program = settings(
        max_examples=600,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises((AssertionError, ValueError, IntegrityError, pytest.fail.Exception)):
        run_state_machine_as_test(WindowMachine, settings=program)
