"""Proves that a hashed cache agrees with itself, from its pages, not from its counters.

The sentences, in the order they are checked for each page; an IntegrityError quotes the evidence:

    a root counts the pages behind it, and has some
    a page continues another of the cache, and is filed under its number and the digest of all tokens up to its end
    a page counts the pages behind it
    a page is locked as often as handles name it and locked pages continue it
    an evictable page is in the eviction queue, or waits to be put there
    the cache counts the locked pages

With a window, where a position may be a ghost:

    a ghost has something behind it
    the pages that a locked handle needs are cached, and they are the pages of its span
    a page is locked as often as spans have it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ..errors import IntegrityError
from .hashed_page import HashedPage, WindowPage
from .hashed_spans import LockSpan
from .hashed_table import DigestTable

__all__ = ["check_prefix_pages", "check_window_pages"]


def check_prefix_pages(
    roots: Sequence[HashedPage], table: DigestTable, by_page: Mapping[int, HashedPage], num_locked: int
) -> None:
    """Returns when every sentence holds of a cache without a window. Cost: a hash a page."""
    pages = by_page.values()
    known = {*roots, *pages}
    num_behind: Counter[HashedPage | None] = Counter(page.parent for page in pages)
    num_locked_behind = Counter(page.parent for page in pages if page.locks)
    _check_roots(roots, num_behind)
    for number, page in by_page.items():
        _require(page.parent in known, f"page {number} continues a page that is not cached")
        _check_filed(f"page {number}", page, table, page.page == number)
        _check_behind(f"page {number}", page, num_behind)
        is_counted = page.locks == page.anchors + num_locked_behind[page]
        _require(is_counted, f"page {number} counts {page.locks} locks, {page.anchors} of them by name")
        _check_queued(f"page {number}", page)
    _check_num_locked(num_locked, sum(page.locks > 0 for page in pages))


def check_window_pages(
    roots: Sequence[WindowPage],
    table: DigestTable,
    by_page: Mapping[int, WindowPage],
    num_locked: int,
    window_pages: int,
    to_offer: Iterable[WindowPage],
) -> None:
    """The same of a cache with a window, whose prefixes need their last `window_pages` pages."""
    pages: list[WindowPage] = list(table.pages())
    waiting = set(to_offer)
    known = {*roots, *pages}
    num_behind: Counter[HashedPage | None] = Counter(page.parent for page in pages)
    num_cached = sum(page.page >= 0 for page in pages)
    _require(num_cached == len(by_page), f"{len(by_page)} pages have a number, {num_cached} a place")
    _check_roots(roots, num_behind)
    for page in pages:
        name = _name(page)
        before = page.parent
        _require(before is not None and before in known, f"{name} continues a page that is not known")
        _require(before is not None and page.position == before.position + 1, f"{name} is at the wrong position")
        _check_filed(name, page, table, page.page < 0 or by_page.get(page.page) is page)
        _check_behind(name, page, num_behind)
        _require(page.page >= 0 or page.num_children > 0, f"{name} has nothing behind it and is not forgotten")
        if page not in waiting:
            _check_queued(name, page)
    locks = _count_locks(pages, window_pages)
    for page in pages:
        _require(page.locks == locks[page], f"{_name(page)} counts {page.locks} locks, {locks[page]} spans have it")
    _check_num_locked(num_locked, len(locks))


def _count_locks(pages: Sequence[WindowPage], window_pages: int) -> Counter[WindowPage]:
    """How many spans have each page, after a check of the spans."""
    locks: Counter[WindowPage] = Counter()
    needed: dict[LockSpan, set[WindowPage]] = {}
    for end in pages:
        name, span = _name(end), end.span
        fits = end.anchors == 0 if span is None else end.anchors > 0 and span.ends.count(end) == 1
        _require(fits, f"{name} is locked by name {end.anchors} times, with the wrong span")
        if span is None:
            continue
        page = end
        for _ in range(min(window_pages, end.position + 1)):
            evidence = f"{name} is locked by name and needs {_name(page)}"
            _require(page.page >= 0 and page in span.pages and page.created <= span.newest, evidence)
            needed.setdefault(span, set()).add(page)
            assert page.parent is not None  # that many pages stand above
            page = page.parent
    for span, own in needed.items():
        agrees = own == set(span.pages) and len(own) == len(span.pages) and len(span.ends) <= 2
        _require(agrees, f"a span has {len(span.pages)} pages, {len(own)} are needed")
        locks.update(own)
    return locks


def _check_roots(roots: Sequence[HashedPage], num_behind: Counter[HashedPage | None]) -> None:
    for root in roots:
        _require(root.num_children == num_behind[root] > 0, f"a root counts {root.num_children} prompts")


def _check_filed(name: str, page: HashedPage, table: DigestTable, has_number: bool) -> None:
    is_filed = has_number and page in table.of_digest(page.digest)
    is_named = page.parent is not None and page.digest == table.page_hash(page.parent.digest + page.token_bytes)
    _require(is_filed and is_named, f"{name} is filed wrongly")


def _check_behind(name: str, page: HashedPage, num_behind: Counter[HashedPage | None]) -> None:
    _require(page.num_children == num_behind[page], f"{name} counts {page.num_children} pages behind it")


def _check_queued(name: str, page: HashedPage) -> None:
    is_queued = page.queued_serial is not None
    _require(is_queued or not page.is_evictable, f"{name} is evictable and not in the eviction queue")


def _check_num_locked(counted: int, num_locked: int) -> None:
    _require(counted == num_locked, f"the cache counts {counted} locked pages, {num_locked} are")


def _name(page: WindowPage) -> str:
    return f"page {page.page}" if page.page >= 0 else f"the ghost at position {page.position}"


def _require(holds: bool, evidence: str) -> None:
    if not holds:
        raise IntegrityError(f"broken: tables and counters of the hashed cache say what its pages say: {evidence}.")
