"""Proves that the books of a manager agree, from what sequences, pins and prefix caches say, not from its counters.

The sentences, in the order they are checked; an IntegrityError quotes the first that does not hold:

    every page is on the free list once or has an owner, never both
    a sequence has as many pages as its tokens need, and names no page twice
    a sequence that is away names no page and locks nothing
    no live sequence names a free or reserved page
    a node of the prefix cache has whole pages, and none beside it begins with the same page
    no page is at two positions of the prefix cache
    every lock of the prefix cache is held by a live sequence or a pin
    the cache counts what its nodes hold
    a page has one owner when the prefix cache holds it, and else as many as live sequences name it
    a live sequence locks the cached pages it names, where it names them and under its tokens, and no others
    a pin locks the pages it names
    the table of the last step names what its sequences name

A prefix cache proves its own structures first (`sanity_check`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .integrity_caches import CacheView, require, view_cache

if TYPE_CHECKING:
    from .hybrid_manager import HybridKVCacheManager
    from .ledger import PageLedger
    from .manager import KVCacheManager
    from .page_budget import PageBudget
    from .pinned import PinnedPrefix
    from .sequence import Sequence

__all__ = ["check_integrity"]

Counts = npt.NDArray[np.int64]


def check_integrity(manager: KVCacheManager | HybridKVCacheManager) -> None:
    """Returns when every sentence above holds of `manager`, and of all that share its pages.

    Cost:   a pass over all pages, all live sequences and all of the prefix cache: for tests, and
            `KVCacheManager(debug=True)`.
    Raises: IntegrityError that quotes the sentence and the evidence.
    """
    budget = manager.budget
    if not budget.lock._is_owned():  # type: ignore[attr-defined]
        manager.settle()
    with budget.lock:
        _check_free_list(budget)
        named = np.zeros(budget.allocator.num_pages, np.int64)
        for ledger in budget.ledgers:
            named += _count_names(ledger)
        views = [view_cache(cache, budget.allocator.num_pages) for cache in budget.caches]
        held = np.zeros(budget.allocator.num_pages, np.int64)
        for view in views:
            held += view.held
        for page in np.flatnonzero(held > 1)[:1]:
            require(False, "no page is at two positions of the prefix cache", f"page {page} is at {held[page]}")
        for view in views:
            view.check_locks([one for one in _lock_holders(budget) if one.cache is view.cache])
            view.check_counters()
        _check_owner_counts(budget, named, held)
        for ledger in budget.ledgers:
            for view in views:
                _check_coverage(ledger, view, held)
            _check_table(ledger)


def _lock_holders(budget: PageBudget) -> list[Sequence | PinnedPrefix]:
    holders: list[Sequence | PinnedPrefix] = []
    for ledger in budget.ledgers:
        holders += [*ledger.live.values(), *ledger.pins.values()]
    return holders


def _check_free_list(budget: PageBudget) -> None:
    sentence = "every page is on the free list once or has an owner, never both"
    owners, free = budget.allocator.owner_counts(), budget.allocator.free_pages()
    listed = np.bincount(free, minlength=owners.shape[0])
    for page in np.flatnonzero(listed > 1)[:1]:
        require(False, sentence, f"page {page} is on the free list {listed[page]} times")
    for page in np.flatnonzero(owners < 0)[:1]:
        require(False, sentence, f"page {page} has {owners[page]} owners")
    for page in np.flatnonzero((listed > 0) & (owners > 0))[:1]:
        require(False, sentence, f"page {page} is on the free list and has {owners[page]} owners")
    for page in np.flatnonzero((listed == 0) & (owners == 0))[:1]:
        require(False, sentence, f"page {page} has no owner and is not on the free list")
    extra = int(np.maximum(owners - 1, 0).sum())
    counted = budget.allocator.num_extra_owners
    require(counted == extra, sentence, f"{counted} owners beyond the first are counted, {extra} are there")


def _count_names(ledger: PageLedger) -> Counts:
    """How many live sequences name each page."""
    num_pages, page_size = ledger.allocator.num_pages, ledger.page_size
    sentence = "a sequence has as many pages as its tokens need, and names no page twice"
    lost_sentence = "no live sequence names a free or reserved page"
    named = np.zeros(num_pages, np.int64)
    is_lost = ledger.allocator.owner_counts() == 0
    is_lost[: ledger.allocator.num_reserved] = True
    for seq in ledger.live.values():
        require(not seq.is_closed, lost_sentence, f"{seq} is closed but counted as live")
        if seq.state != "on pages":
            is_away = not seq.page_ids and seq.lock_handle is None
            require(is_away, "a sequence that is away names no page and locks nothing", f"{seq} does")
            continue
        pages, num_gone = np.array(seq.page_ids, np.int64), seq.num_pages_given_back
        needed = -(-seq.num_tokens // page_size)
        require(pages.size == needed, sentence, f"{seq} needs {needed} pages and has {pages.size}")
        fits = 0 <= seq.num_cached_tokens <= seq.num_committed <= seq.num_tokens
        require(fits, sentence, f"{seq} has {seq.num_cached_tokens} cached tokens")
        is_gone = (pages[:num_gone] == -1).all() and not (pages[num_gone:] == -1).any()
        require(bool(is_gone), sentence, f"{seq} has given back {num_gone} pages and names {pages.tolist()}")
        _check_window(seq, num_gone, page_size)
        pages = pages[num_gone:]
        outside = pages[(pages < 0) | (pages >= num_pages)]
        require(not outside.size, sentence, f"{seq} names {outside.tolist()}, outside 0..{num_pages - 1}")
        require(np.unique(pages).size == pages.size, sentence, f"{seq} names {pages.tolist()}")
        lost = pages[is_lost[pages]]
        require(not lost.size, lost_sentence, f"{seq} names {lost.tolist()}")
        named[pages] += 1
    return named


def _check_window(seq: Sequence, num_gone: int, page_size: int) -> None:
    sentence = "a sequence has as many pages as its tokens need, and names no page twice"
    seen_from = 0 if seq.window is None else max(0, seq.num_committed - seq.window + 1)
    evidence = f"{seq} has given back {num_gone} pages, and its next token sees all from position {seen_from}"
    require(num_gone * page_size <= seen_from, sentence, evidence)


def _check_owner_counts(budget: PageBudget, named: Counts, held: Counts) -> None:
    sentence = "a page has one owner when the prefix cache holds it, and else as many as live sequences name it"
    owners = budget.allocator.owner_counts()
    expected = np.where(held > 0, 1, named)
    expected[: budget.allocator.num_reserved] += 1
    for page, times in budget.copy_sources.items():
        expected[page] += times
    for page in np.flatnonzero(owners != expected)[:1]:
        where = "holds it" if held[page] else "does not hold it"
        evidence = (
            f"page {page} has {owners[page]} owners, {named[page]} sequences name it, the prefix cache {where} "
            f"and {budget.copy_sources.get(int(page), 0)} copies wait for it"
        )
        require(False, sentence, evidence)


def _check_coverage(ledger: PageLedger, view: CacheView, held: Counts) -> None:
    sentence = (
        "a live sequence locks the cached pages it names, where it names them and under its tokens, and no others"
    )
    for seq in ledger.live.values():
        if seq.cache is not view.cache or seq.state != "on pages":
            continue
        num_locked = seq.num_locked_tokens
        tokens, locked = view.locked(seq)
        tokens, locked = tokens[:num_locked], locked[: num_locked // ledger.page_size]
        pages, num_gone = np.array(seq.page_ids, np.int64), seq.num_pages_given_back
        require(locked.size <= pages.size, sentence, f"{seq} locks {locked.size} pages and names {pages.size}")
        others = np.flatnonzero((locked != pages[: locked.size])[num_gone:]) + num_gone
        require(not others.size, sentence, f"{seq} locks pages {locked[others].tolist()} that it does not name")
        for position in np.flatnonzero(held[pages[num_gone:]] > 0) + num_gone:
            is_there = bool(position < locked.size) and bool(locked[position] == pages[position])
            require(is_there, sentence, f"{seq} names page {pages[position]} at {position}, which is not locked there")
        known = min(tokens.size, seq.num_committed)
        agree = np.array_equal(tokens[:known], np.array(seq.token_ids[:known], np.int64))
        require(agree, sentence, f"{seq} locks other tokens than it committed")
    for pin in ledger.pins.values():
        if pin.cache is view.cache:
            _, locked = view.locked(pin)
            is_equal = locked.tolist() == list(pin.page_ids)
            require(is_equal, "a pin locks the pages it names", f"{pin} names {pin.page_ids}, not {locked.tolist()}")


def _check_table(ledger: PageLedger) -> None:
    sentence = "the table of the last step names what its sequences name"
    for seq, pages in () if ledger.planner is None else ledger.planner.table_rows():
        expected = np.maximum(seq.row_pages(), 0)
        require(np.array_equal(pages, expected), sentence, f"{seq} has {expected.tolist()}, not {pages.tolist()}")
