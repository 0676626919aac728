"""The native core and its Python twin take the same random programs, step by step with equal results."""

import random

import numpy as np
import pytest

from pagedkv import RadixCache
from pagedkv.management import native_radix_tree
from pagedkv.management.eviction import eviction_policies

pytestmark = pytest.mark.native

NAMESPACES = [None, None, None, "", "a", ("a", 0)]
WIDE = 2**31


class LongestFirst:
    """A policy of a user: not known to the core, with ties, and with a rank that changes when a run is split."""

    def priority(self, run):
        return (-run.num_pages, run.num_hits % 3, 0.5)


class Twins:
    """Two caches that are told the same; `both` calls each with its own handles and compares what comes back."""

    def __init__(self, seed, page_size, eviction, num_pages=60):
        self.random = random.Random(seed)
        self.page_size = page_size
        self.caches = [RadixCache(page_size, eviction, events=True, core=core) for core in ("python", "native")]
        self.free = list(range(num_pages))
        self.random.shuffle(self.free)
        # Pairs of handles: any that were ever given, and those that are locked, once a lock.
        self.known, self.locked = [], []
        self.story = [self.token() for _ in range(12 * page_size)]

    def token(self):
        return self.random.choice([0, 1, 1, 2, WIDE]) if self.random.random() < 0.01 else self.random.randrange(3)

    def prompt(self):
        """A beginning of one story and then something else, so that prompts part ways inside nodes and pages."""
        length = self.random.randrange(len(self.story) + 1)
        rest = [self.token() for _ in range(self.random.randrange(3 * self.page_size))]
        ids = self.story[:length] + rest
        form = self.random.choice([list, np.array, lambda ids: np.array(ids, np.int64)[::1]])
        return ids if form is list else np.array(ids, np.int64 if max(ids, default=0) >= WIDE else np.int32)

    def both(self, call, *args, handles=None, **options):
        results = []
        for number, cache in enumerate(self.caches):
            own = () if handles is None else (handles[number],)
            try:
                results.append(getattr(cache, call)(*own, *args, **options))
            except (ValueError, TypeError) as error:
                results.append(error)
        left, right = map(plain, results)
        assert left == right, f"{call}: python {left}, native {right}"
        return None if isinstance(results[0], Exception) else results

    def keep(self, results):
        self.known.append(tuple(result.handle for result in results))
        del self.known[:-30]

    def any_handle(self):
        return self.random.choice(self.known) if self.known else None

    def take(self, num_pages):
        return self.free[-num_pages:] if num_pages else []

    def step_match(self):
        self.keep(self.both("match", self.prompt(), self.random.choice(NAMESPACES)))

    def step_insert(self, handles=None):
        ids = self.prompt()[: self.page_size * len(self.free)]
        pages = self.take(len(ids) // self.page_size)
        if pages and self.random.random() < 0.05:
            pages[-1] = self.random.choice([-1, pages[0], self.random.randrange(60)])
        options = {"only_new": self.random.random() < 0.3, "priority": self.random.choice([0, 0, 1, 5])}
        given = np.array(pages, np.int32) if self.random.random() < 0.5 else pages
        if handles is None:
            results = self.both("insert", ids, given, self.random.choice(NAMESPACES), **options)
        else:
            results = self.both("extend", ids, given, handles=handles, **options)
        if results is not None:
            self.keep(results)
            held = self.caches[0].holds(np.array(pages, np.int64))
            taken = {page for page, is_held in zip(pages, held, strict=True) if is_held}
            self.free = [page for page in self.free if page not in taken]

    def step_extend(self):
        handles = self.random.choice(self.locked) if self.locked and self.random.random() < 0.7 else self.any_handle()
        if handles is not None:
            self.step_insert(handles)

    def step_lock(self):
        handles = self.any_handle()
        if handles is not None and self.both("lock", handles=handles) is not None:
            self.locked.append(handles)

    def step_unlock(self):
        if self.random.random() < 0.1 and self.known:
            handles = self.any_handle()
        elif self.locked:
            handles = self.random.choice(self.locked)
        else:
            return
        # An unlock through another handle of the same node is the same to the tree.
        if self.both("unlock", handles=handles) is not None and handles in self.locked:
            self.locked.remove(handles)

    def step_ancestor(self):
        handles = self.any_handle()
        if handles is not None:
            results = self.both("ancestor", self.random.randrange(handles[0].num_tokens + 2), handles=handles)
            if results is not None:
                self.known.append(tuple(results))

    def step_locked_tokens(self):
        handles = self.any_handle()
        if handles is not None:
            self.both("locked_tokens", self.random.randrange(handles[0].num_tokens + 2), handles=handles)

    def step_evict(self):
        results = self.both("evict", self.random.choice([0, 1, 1, 2, 5, 17]))
        self.free += results[0].tolist()

    def step_reset(self):
        while self.locked and self.random.random() < 0.9:
            self.both("unlock", handles=self.locked.pop())
        results = self.both("reset", force=self.random.random() < 0.5)
        if results is not None:
            self.free += results[0].tolist()
            self.locked.clear()

    def step_forge(self):
        """A handle that was given, of another length: the first pages of the same, or nothing that there is."""
        handles = self.any_handle()
        if handles is not None:
            num_tokens = self.random.choice([-1, 1, self.page_size, handles[0].num_tokens + self.page_size, 2**62])
            forged = tuple(handle._replace(num_tokens=num_tokens) for handle in handles)
            self.both("locked_tokens", 0, handles=forged)
            self.both("ancestor", self.page_size, handles=forged)
            if self.both("lock", handles=forged) is not None:
                self.locked.append(forged)

    def run(self, num_steps):
        steps = {"match": 5, "insert": 5, "extend": 4, "lock": 4, "unlock": 4, "ancestor": 2, "locked_tokens": 1}
        steps |= {"evict": 3, "reset": 0.1, "forge": 0.5}
        for number in range(num_steps):
            getattr(self, "step_" + self.random.choices(list(steps), list(steps.values()))[0])()
            left, right = self.caches
            assert (left.num_cached_pages, left.num_evictable_pages) == (
                right.num_cached_pages,
                right.num_evictable_pages,
            )
            if number % 20 == 0:
                self.compare_all()
        self.compare_all()

    def compare_all(self):
        for cache in self.caches:
            cache.sanity_check()
        assert picture(self.caches[0]) == picture(self.caches[1])
        self.both("held_mask", 70)
        assert self.caches[0].events.take() == self.caches[1].events.take()


def plain(result):
    """What two cores must agree in: everything but what a handle is made of."""
    if isinstance(result, Exception):
        return type(result), str(result)
    if isinstance(result, np.ndarray):
        return result.dtype, result.tolist()
    if hasattr(result, "handle"):
        return tuple(plain(part) for part in result[:-1]), plain(result.handle)
    return result.num_tokens if hasattr(result, "num_tokens") else result


def picture(cache):
    """Every node by its pages, with all that is to be equal."""
    return {
        (node.namespace if node.parent is None else None, tuple(node.pages.tolist())): (
            node.tokens.tolist(),
            None if node.parent is None else node.parent.pages.tolist(),
            len(node.children),
            (node.locks, node.anchors, node.num_hits, node.priority),
            (node.created if node.parent is not None else 0, node.last_access, node.is_evictable),
        )
        for node in cache.nodes()
    }


@pytest.mark.parametrize("page_size", [1, 2, 5, 16])
@pytest.mark.parametrize("eviction", [*eviction_policies(), "of the user"])
def test_random_programs_give_equal_results(eviction, page_size):
    for seed in range(5):
        Twins(seed, page_size, LongestFirst() if eviction == "of the user" else eviction).run(200)


def test_a_twin_that_differs_is_seen(monkeypatch):
    """LFU in place of LRU in one of them."""
    policies = native_radix_tree._NATIVE_POLICIES
    monkeypatch.setattr(native_radix_tree, "_NATIVE_POLICIES", (policies[1], policies[0], *policies[2:]))
    with pytest.raises(AssertionError, match="evict: python"):
        Twins(0, 1, "lru").run(1000)


def test_the_native_core_takes_any_numbers():
    """Without the checks in Python around it: what names nothing is refused by every call."""
    rng, cache = random.Random(0), RadixCache(2, core="native")
    kept = cache.insert(range(400), range(200)).handle
    for number in range(40, 400, 40):
        cache.insert([*range(number), 9, 9], range(1000 + number, 1000 + number + number // 2 + 1))
    before, calls, ids, page = picture(cache), cache._tree._calls, np.array([9, 9], np.int32), np.array([7], np.int32)
    num_refused = num_locked = 0

    def any_number(real):
        return rng.choice([real, real, real + 1, real - 1, rng.randrange(30), rng.randrange(-(2**63), 2**63)])

    for _ in range(5000):
        node, version, num_tokens = handle = [any_number(real) for real in kept]
        try:
            calls["lock"](*handle)
        except ValueError:
            num_refused += 1
            rest = {"unlock": (), "ancestor": (any_number(2),), "copy_tokens": (any_number(0), np.empty(9, np.int64))}
            rest["extend"] = (ids, page, False, 0)
            for name, arguments in rest.items():
                with pytest.raises(ValueError, match="must"):
                    calls[name](*handle, *arguments)
        else:
            num_locked += 1
            assert version == kept.version
            assert num_tokens in range(2, 401, 2)
            calls["unlock"](*handle)
        for root in {node, version, num_tokens} - {0}:
            with pytest.raises(ValueError, match="root must be one of the tree, got"):
                calls["insert"](root, ids, page, False, 0)
            with pytest.raises(ValueError, match="root must be one without nodes, got"):
                calls["drop_root"](root)
            assert calls["match"](root, ids, np.empty(1, np.int32)) == 0
    assert min(num_refused, num_locked) > 100
    assert before.keys() == picture(cache).keys()
    cache.sanity_check()
