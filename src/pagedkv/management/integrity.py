"""Proves that the books of a manager agree, from what sequences and the radix tree say, not from its counters.

The sentences, in the order they are checked; an IntegrityError quotes the first that does not hold:

    every page is on the free list once or has an owner, never both
    a sequence has as many pages as its tokens need, and names no page twice
    no live sequence names a free page
    a node of the radix tree has whole pages, and its parent files it under its first page
    no page is at two positions of the radix tree
    every lock of the radix tree is held by a live sequence
    a node is not used later than its parent
    every evictable node is in the eviction queue
    the cache counts what its nodes hold
    a page has as many owners as live sequences name it, plus one when the prefix cache holds it
    a live sequence locks the cached pages it names, where it names them and under its tokens, and no others
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError
from .radix_cache import RadixCache
from .radix_node import RadixNode

if TYPE_CHECKING:
    from .ledger import PageLedger
    from .manager import KVCacheManager

__all__ = ["check_integrity"]

Counts = npt.NDArray[np.int64]


def check_integrity(manager: KVCacheManager) -> None:
    """Returns when every sentence above holds of `manager`.

    Cost:   a pass over all pages, all live sequences and the whole tree: for tests, and `KVCacheManager(debug=True)`.
    Raises: IntegrityError that quotes the sentence and the evidence.
    """
    ledger = manager.ledger
    with ledger.lock:
        _check_free_list(ledger)
        named = _count_names(ledger)
        held = np.zeros(ledger.allocator.num_pages, np.int64)
        if ledger.cache is not None:
            _check_nodes(ledger.cache)
            held = _count_held(ledger.cache, ledger.allocator.num_pages)
            _check_locks(ledger, ledger.cache)
            _check_eviction(ledger.cache)
            _check_counters(ledger.cache, held)
        _check_owner_counts(ledger, named, held)
        if ledger.cache is not None:
            _check_coverage(ledger, held)


def _require(holds: bool, sentence: str, evidence: str) -> None:
    if not holds:
        raise IntegrityError(f"broken: {sentence}: {evidence}.")


def _check_free_list(ledger: PageLedger) -> None:
    sentence = "every page is on the free list once or has an owner, never both"
    owners, free = ledger.allocator.owner_counts(), ledger.allocator.free_pages()
    listed = np.bincount(free, minlength=owners.shape[0])
    for page in np.flatnonzero(listed > 1)[:1]:
        _require(False, sentence, f"page {page} is on the free list {listed[page]} times")
    for page in np.flatnonzero(owners < 0)[:1]:
        _require(False, sentence, f"page {page} has {owners[page]} owners")
    for page in np.flatnonzero((listed > 0) & (owners > 0))[:1]:
        _require(False, sentence, f"page {page} is on the free list and has {owners[page]} owners")
    for page in np.flatnonzero((listed == 0) & (owners == 0))[:1]:
        _require(False, sentence, f"page {page} has no owner and is not on the free list")


def _count_names(ledger: PageLedger) -> Counts:
    """How many live sequences name each page."""
    num_pages, page_size = ledger.allocator.num_pages, ledger.page_size
    sentence = "a sequence has as many pages as its tokens need, and names no page twice"
    named = np.zeros(num_pages, np.int64)
    free = ledger.allocator.owner_counts() == 0
    for seq in ledger.live.values():
        pages = np.array(seq.page_ids, np.int64)
        _require(not seq.is_closed, "no live sequence names a free page", f"{seq} is closed but counted as live")
        needed = -(-seq.num_tokens // page_size)
        _require(pages.size == needed, sentence, f"{seq} needs {needed} pages and has {pages.size}")
        fits = 0 <= seq.num_cached_tokens <= seq.num_committed <= seq.num_tokens
        _require(fits, sentence, f"{seq} has {seq.num_cached_tokens} cached tokens")
        outside = pages[(pages < 0) | (pages >= num_pages)]
        _require(not outside.size, sentence, f"{seq} names {outside.tolist()}, outside 0..{num_pages - 1}")
        _require(np.unique(pages).size == pages.size, sentence, f"{seq} names {pages.tolist()}")
        lost = pages[free[pages]]
        _require(not lost.size, "no live sequence names a free page", f"{seq} names {lost.tolist()}")
        named[pages] += 1
    return named


def _check_nodes(cache: RadixCache) -> None:
    sentence = "a node of the radix tree has whole pages, and its parent files it under its first page"
    for node in cache.nodes():
        pages, tokens = node.pages, node.tokens
        fits = pages.size == node.num_pages and tokens.size == node.num_pages * cache.page_size
        _require(fits, sentence, f"a node of {node.num_pages} pages holds {pages.size} pages and {tokens.size} tokens")
        _require(
            (node.num_pages > 0) == (node.parent is not None) and (node.num_pages > 0 or bool(node.children)),
            sentence,
            f"a {'root' if node.parent is None else 'node'} has {node.num_pages} pages, {len(node.children)} children",
        )
        for key, child in node.children.items():
            filed = key == child.child_key == child.tokens[: cache.page_size].tobytes() and child.parent is node
            _require(filed, sentence, f"the node of pages {child.pages.tolist()} is filed wrongly")


def _count_held(cache: RadixCache, num_pages: int) -> Counts:
    sentence = "no page is at two positions of the radix tree"
    pages = np.concatenate([np.empty(0, np.int64), *(node.pages for node in cache.nodes())])
    _require(not ((pages < 0) | (pages >= num_pages)).any(), sentence, f"pages outside 0..{num_pages - 1}")
    held = np.bincount(pages, minlength=num_pages)
    for page in np.flatnonzero(held > 1)[:1]:
        _require(False, sentence, f"page {page} is at {held[page]}")
    return held


def _check_locks(ledger: PageLedger, cache: RadixCache) -> None:
    sentence = "every lock of the radix tree is held by a live sequence"
    handles = [seq.lock_handle for seq in ledger.live.values() if seq.lock_handle is not None]
    anchors = Counter(id(handle.node) for handle in handles)
    expected: Counter[int] = Counter()
    for handle in handles:
        node: RadixNode | None = handle.node
        while node is not None:
            expected[id(node)] += 1
            node = node.parent
    nodes = list(cache.nodes())
    gone = set(anchors) - {id(node) for node in nodes}
    _require(not gone, sentence, f"{len(gone)} live sequences lock nodes that are not in the tree")
    for node in nodes:
        if node.parent is not None:
            _require(
                node.locks == expected[id(node)] and node.anchors == anchors[id(node)],
                sentence,
                f"the node of pages {node.pages.tolist()} is locked {node.locks} times, {node.anchors} by name, "
                f"but live sequences lock it {expected[id(node)]} times, {anchors[id(node)]} by name",
            )


def _check_eviction(cache: RadixCache) -> None:
    for node in cache.nodes():
        pages = f"the node of pages {node.pages.tolist()}"
        if node.parent is not None:
            is_ordered = node.last_access <= node.parent.last_access
            _require(is_ordered, "a node is not used later than its parent", f"{pages} is, at {node.last_access}")
        is_queued = node.queued_serial is not None
        _require(is_queued or not node.is_evictable, "every evictable node is in the eviction queue", f"{pages} is not")


def _check_counters(cache: RadixCache, held: Counts) -> None:
    sentence = "the cache counts what its nodes hold"
    num_cached = int(held.sum())
    num_evictable = sum(node.num_pages for node in cache.nodes() if node.locks == 0)
    _require(cache.num_cached_pages == num_cached, sentence, f"{cache.num_cached_pages} counted, {num_cached} held")
    counted = cache.num_evictable_pages
    _require(counted == num_evictable, sentence, f"{counted} counted as evictable, {num_evictable} are")
    marked = cache.held_mask(held.shape[0])
    for page in np.flatnonzero(marked != (held > 0))[:1]:
        _require(False, sentence, f"page {page} is {'not ' if marked[page] else ''}in the tree but marked otherwise")


def _check_owner_counts(ledger: PageLedger, named: Counts, held: Counts) -> None:
    sentence = "a page has as many owners as live sequences name it, plus one when the prefix cache holds it"
    owners = ledger.allocator.owner_counts()
    for page in np.flatnonzero(owners != named + held)[:1]:
        where = "holds it" if held[page] else "does not hold it"
        evidence = (
            f"page {page} has {owners[page]} owners, {named[page]} sequences name it and the prefix cache {where}"
        )
        _require(False, sentence, evidence)


def _check_coverage(ledger: PageLedger, held: Counts) -> None:
    sentence = (
        "a live sequence locks the cached pages it names, where it names them and under its tokens, and no others"
    )
    for seq in ledger.live.values():
        path: list[RadixNode] = []
        node = None if seq.lock_handle is None else seq.lock_handle.node
        while node is not None:
            path.append(node)
            node = node.parent
        locked = np.concatenate([np.empty(0, np.int64), *(node.pages for node in reversed(path))])
        tokens = np.concatenate([np.empty(0, np.int64), *(node.tokens for node in reversed(path))])
        length = 0 if seq.lock_handle is None else seq.lock_handle.num_tokens
        _require(tokens.size == length, sentence, f"{seq} locks {tokens.size} tokens under a handle of {length}")
        pages = np.array(seq.page_ids, np.int64)
        _require(locked.size <= pages.size, sentence, f"{seq} locks {locked.size} pages and names {pages.size}")
        others = np.flatnonzero(locked != pages[: locked.size])
        _require(not others.size, sentence, f"{seq} locks pages {locked[others].tolist()} that it does not name")
        for position in np.flatnonzero(held[pages] > 0):
            is_there = bool(position < locked.size) and bool(locked[position] == pages[position])
            _require(is_there, sentence, f"{seq} names page {pages[position]} at {position}, which is not locked there")
        known = min(tokens.size, seq.num_committed)
        agree = np.array_equal(tokens[:known], np.array(seq.token_ids[:known], np.int64))
        _require(agree, sentence, f"{seq} locks other tokens than it committed")
