"""The runs of pages that a look at a hashed cache shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .allocator import PageArray
from .hashed_page import HashedPage, WindowPage, token_array
from .prefix_cache import Namespace
from .token_ids import TokenArray

__all__ = ["PageRun", "page_runs", "window_runs"]


@dataclass(eq=False)
class PageRun:
    """Pages that continue each other, without a branch or the end of a locked handle between them: a copy.

    A root has a namespace, no pages and no parent. Counts and times are those of all uses that ran through the run.
    locks: how many locked handles protect it. anchors: how many of them end with it.

    In a cache with a window no page is missing inside a run, as many handles protect each page of it, and counts and
    times are those of its own pages. Its parent is the last run before it, from which `num_missing` pages part it.
    """

    parent: PageRun | None
    namespace: Namespace
    last: HashedPage
    members: list[HashedPage] = field(default_factory=list)
    children: list[PageRun] = field(default_factory=list)
    locks: int = 0
    last_access: int = 0
    num_hits: int = 0
    num_missing: int = 0

    @property
    def num_pages(self) -> int:
        """Pages of the run."""
        return len(self.members)

    @property
    def pages(self) -> PageArray:
        """Page ids of the run [num_pages]."""
        return np.array([page.page for page in self.members], np.int32)

    @property
    def tokens(self) -> TokenArray:
        """Token ids of the run [num_pages * page_size]."""
        return token_array(b"".join(page.token_bytes for page in self.members))

    @property
    def anchors(self) -> int:
        """How many locked handles end with it."""
        return self.last.anchors

    @property
    def created(self) -> int:
        """When its first page came into the cache."""
        return (self.members or [self.last])[0].created

    @property
    def is_evictable(self) -> bool:
        """True when its last page is."""
        return self.last.is_evictable


def page_runs(roots: Iterable[HashedPage], pages: Iterable[HashedPage]) -> list[PageRun]:
    """The runs of all `pages`, which come after the pages that they continue; roots first, parents before children."""
    run_of: dict[HashedPage, PageRun] = {root: PageRun(None, root.namespace, root) for root in roots}
    runs = list(run_of.values())
    for page in pages:
        before = page.parent
        assert before is not None  # only roots have none
        run = run_of[before]
        if before.parent is None or before.num_children > 1 or before.anchors:
            run = PageRun(run, None, page)
            runs.append(run)
        run.members.append(page)
        run.last = page
        run_of[page] = run
    for run in reversed(runs):
        _sum_up(run)
    return runs


def _sum_up(run: PageRun) -> None:
    """Adds what the pages of a run and the runs behind it know of their uses; these are summed up already."""
    run.children.reverse()
    own = run.members or [run.last]
    run.last_access = max([page.last_access for page in own] + [child.last_access for child in run.children])
    run.num_hits = sum(page.num_hits for page in own) + sum(child.num_hits for child in run.children)
    run.locks = run.anchors + sum(child.locks for child in run.children)
    if run.parent is not None:
        run.parent.children.append(run)


def window_runs(roots: Iterable[WindowPage], pages: Iterable[WindowPage], window_pages: int) -> list[PageRun]:
    """The same of the pages and ghosts of a cache with a window, in any order; ghosts are in no run.

    window_pages: how many pages a handle protects.
    """
    pages = sorted(pages, key=lambda page: page.position)
    locks = _num_handles(pages, window_pages)
    run_of: dict[WindowPage, PageRun] = {root: PageRun(None, root.namespace, root) for root in roots}
    num_missing: Counter[WindowPage] = Counter()
    runs = list(run_of.values())
    for page in pages:
        before = page.parent
        assert before is not None  # only roots have none
        run = run_of[before]
        if page.page < 0:
            num_missing[page] = num_missing[before] + 1
        else:
            is_apart = before.page < 0 or before.num_children > 1 or before.anchors or locks[page] != locks[before]
            if is_apart:
                run = PageRun(run, None, page, locks=locks[page], num_missing=num_missing[before])
                runs.append(run)
            run.members.append(page)
            run.last = page
        run_of[page] = run
    for run in runs:
        run.last_access = max((page.last_access for page in run.members), default=run.last.last_access)
        run.num_hits = max((page.num_hits for page in run.members), default=0)
        if run.parent is not None:
            run.parent.children.append(run)
    return runs


def _num_handles(pages: Iterable[WindowPage], window_pages: int) -> Counter[WindowPage]:
    """How many locked handles protect each page."""
    locks: Counter[WindowPage] = Counter()
    for page in pages:
        if page.anchors:
            needed: WindowPage | None = page
            for _ in range(min(window_pages, page.position + 1)):
                assert needed is not None  # that many pages stand above
                locks[needed] += page.anchors
                needed = needed.parent
    return locks
