"""What a step of decoding publishes in one call is what its sequences would have published one by one."""

import numpy as np
import pytest

from pagedkv import KVCacheManager, RadixCache, check_integrity
from pagedkv.management import step_commit
from pagedkv.management.radix_cache import CacheHandle

pytestmark = pytest.mark.native


@pytest.fixture(params=[1, 10**9], ids=["at once", "one by one"])
def fewest(request, monkeypatch):
    monkeypatch.setattr(step_commit, "_FEWEST_AT_ONCE", request.param)
    return request.param


def opened(manager, ids, **options):
    seq = manager.open(ids[:-1], **options)
    seq.append(len(ids) - seq.num_cached_tokens)
    seq.commit(ids[seq.num_cached_tokens :])
    return seq


def told(manager, seqs):
    """All that anybody can see of the sequences and of the cache."""
    cache = manager.ledger.cache
    nodes = sorted(
        (node.tokens.tolist(), node.pages.tolist(), node.locks, node.anchors, node.priority) for node in cache.nodes()
    )
    return nodes, [(seq.token_ids, seq.page_ids, seq.num_locked_tokens) for seq in seqs], manager.num_free_pages


def run(page_size, num_steps, make):
    manager = KVCacheManager(400, page_size, debug=True)
    seqs = make(manager)
    for step in range(num_steps):
        manager.batch(seqs)
        manager.commit(seqs, [100 + (7 * step + number) % 50 for number in range(len(seqs))])
    check_integrity(manager)
    return manager, seqs


def different(manager):
    return [opened(manager, [number] * (3 + number % 5), priority=number % 3) for number in range(7)]


def equal_prompts(manager):
    return [opened(manager, [1, 2, 3, 4, 5]) for _ in range(5)] + different(manager)


def with_forks(manager):
    seqs = different(manager)
    return [*seqs, seqs[0].fork(), seqs[3].fork()]


def with_a_truncated_one(manager):
    seqs = different(manager)
    seqs[4].truncate(2)
    seqs[4].append(1)
    seqs[4].commit([9])
    return seqs


def with_a_window(manager):
    return [*different(manager), opened(manager, [1, 2, 3, 4, 5, 6], window=4)]


def not_cached_yet(manager):
    return [opened(manager, [number]) for number in range(6)]


def with_pages_that_forks_have_published(manager):
    """Their locks reach behind what they have committed."""
    seqs = [opened(manager, [number]) for number in range(4)]
    for seq in seqs:
        seq.append(17)
    forks = [seq.fork() for seq in seqs]
    for number, seq in enumerate(seqs):
        # What `run` commits: forks must agree.
        seq.commit([100 + (7 * step + number) % 50 for step in range(9)])
    assert {fork.num_committed for fork in forks} == {1}
    assert all(fork.num_locked_tokens > 4 for fork in forks)
    return forks


WORLDS = [
    with_pages_that_forks_have_published,
    different,
    equal_prompts,
    with_forks,
    with_a_truncated_one,
    with_a_window,
    not_cached_yet,
]


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("make", WORLDS)
def test_a_step_publishes_what_each_sequence_would(make, page_size, monkeypatch):
    results = []
    for fewest in (1, 10**9):
        monkeypatch.setattr(step_commit, "_FEWEST_AT_ONCE", fewest)
        manager, seqs = run(page_size, 9, make if make is not with_forks else different)
        if make is with_forks:
            seqs += [seqs[0].fork(), seqs[3].fork()]
            for ids in ([5] * 9, [6] * 9):
                manager.batch(seqs)
                manager.commit(seqs, ids)
        results.append(told(manager, seqs))
        for seq in seqs:
            seq.close()
        check_integrity(manager)
        results[-1] += (sorted(page for node in manager.ledger.cache.nodes() for page in node.pages.tolist()),)
    assert results[0] == results[1]


def test_the_one_call_is_made(monkeypatch):
    grown = []
    extend_leaves = RadixCache.extend_leaves

    def noted(self, *args):
        grown.append(extend_leaves(self, *args))
        return grown[-1]

    monkeypatch.setattr(RadixCache, "extend_leaves", noted)
    run(1, 3, different)
    assert [mask.tolist() for mask in grown] == [[True] * 7] * 3


def extend(cache, handle, tokens, pages):
    mask = cache.extend_leaves(
        [handle],
        np.array(tokens, np.int32),
        np.zeros(1, np.int64),
        np.array(pages, np.int32),
        np.zeros(1, np.int64),
        np.array([len(pages)], np.int64),
        [0],
    )
    return mask.tolist()


def test_only_a_leaf_that_is_locked_once_and_ends_there_grows():
    cache = RadixCache(page_size=2)
    handle = cache.insert([1, 2, 3, 4], [0, 1]).handle
    assert extend(cache, handle, [5, 6], [2]) == [False]  # not locked
    cache.lock(handle)
    assert extend(cache, cache.ancestor(handle, 2), [5, 6], [2]) == [False]  # not its end
    assert extend(cache, CacheHandle(handle.node, handle.version + 1, 4), [5, 6], [2]) == [False]
    assert extend(cache, handle, [5, 6], [1]) == [False]  # a page that it holds
    assert extend(cache, handle, [5, 6, 7, 8], [2, 2]) == [False]
    assert extend(cache, handle, [5, 6], [2]) == [True]
    assert cache.match([1, 2, 3, 4, 5, 6]).pages.tolist() == [0, 1, 2]
    longer = CacheHandle(handle.node, handle.version, 6)
    cache.lock(longer)
    assert extend(cache, longer, [7, 8], [3]) == [False]  # locked twice
    cache.unlock(longer)
    cache.insert([1, 2, 3, 4, 5, 6, 9, 9], [0, 1, 2, 4])
    assert extend(cache, longer, [7, 8], [3]) == [False]  # not a leaf
    cache.sanity_check()
    assert cache.num_cached_pages == 4


def test_rows_out_of_bounds_are_refused():
    cache = RadixCache(page_size=2)
    handle = cache.insert([1, 2], [0]).handle
    cache.lock(handle)
    with pytest.raises(ValueError, match="rows must lie in tokens and pages"):
        extend(cache, handle, [5, 6], [2, 3])
    assert cache.num_cached_pages == 1


def test_a_cache_that_fails_midway_leaves_committed_what_it_took(fewest, monkeypatch):
    manager = KVCacheManager(60, 1)
    seqs = different(manager)
    manager.batch(seqs)
    before = [seq.num_committed for seq in seqs]
    extend_one = RadixCache.extend
    extend_leaves = RadixCache.extend_leaves
    refused = seqs[3].lock_handle

    def extend(self, handle, *args, **options):
        if handle == refused:
            raise RuntimeError("no")
        return extend_one(self, handle, *args, **options)

    def all_but_one(self, handles, *args):
        return extend_leaves(
            self, [CacheHandle(-1, 0, 0) if handle == refused else handle for handle in handles], *args
        )

    monkeypatch.setattr(RadixCache, "extend", extend)
    monkeypatch.setattr(RadixCache, "extend_leaves", all_but_one)
    with pytest.raises(RuntimeError, match="no"):
        manager.commit(seqs, list(range(7)))
    grown = [seq.num_committed - count for seq, count in zip(seqs, before, strict=True)]
    assert grown == ([1, 1, 1, 0, 1, 1, 1] if fewest == 1 else [1, 1, 1, 0, 0, 0, 0])
    monkeypatch.undo()
    check_integrity(manager)
    late = [seq for seq, count in zip(seqs, grown, strict=True) if not count]
    manager.commit(late, list(range(len(late))))
    check_integrity(manager)
    assert [seq.num_committed for seq in seqs] == [count + 1 for count in before]
