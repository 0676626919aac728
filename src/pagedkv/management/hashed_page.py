"""One page of a hashed cache, and the runs of pages that a look at the cache shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from sys import getsizeof

import numpy as np

from .allocator import PageArray
from .prefix_cache import Namespace
from .token_ids import TokenArray

__all__ = ["HashedPage", "PageRun", "page_runs", "token_array"]


class HashedPage:
    """One cached page, or the root of a namespace, which has no page and no parent.

    locks:   how many locked handles name this page, plus how many locked pages continue it.
    anchors: how many locked handles name this page.
    last_access, num_hits, priority: without the uses of pages that continue it and are still cached. What leaves the
             cache hands its own on to its parent, so they are complete when the page has become a leaf, which is when a
             policy looks at them; a use costs the same for a prompt of any length.
    next_equal: another page of the same digest, if the hash function collides.
    """

    __slots__ = (
        "anchors",
        "created",
        "digest",
        "last_access",
        "locks",
        "namespace",
        "next_equal",
        "num_children",
        "num_hits",
        "page",
        "parent",
        "priority",
        "queued_priority",
        "queued_serial",
        "token_bytes",
    )

    def __init__(
        self, parent: HashedPage | None, namespace: Namespace, digest: bytes, token_bytes: bytes, page: int, time: int
    ) -> None:
        self.parent = parent
        self.namespace = namespace
        self.digest = digest
        self.token_bytes = token_bytes
        self.page = page
        self.created = self.last_access = time
        self.locks = self.anchors = self.num_children = self.num_hits = self.priority = 0
        self.next_equal: HashedPage | None = None
        self.queued_serial: int | None = None
        self.queued_priority: tuple[float, ...] = ()

    @property
    def num_pages(self) -> int:
        """1, or 0 for a root."""
        return int(self.page >= 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of its objects: itself, its tokens, its digest and its numbers."""
        return sum(map(getsizeof, (self, self.token_bytes, self.digest, self.page, self.last_access)))

    @property
    def is_evictable(self) -> bool:
        """True for a page in the cache that nothing locks and nothing continues."""
        return self.locks == 0 and self.num_children == 0 and self.parent is not None


@dataclass(eq=False)
class PageRun:
    """Pages that continue each other, without a branch or the end of a locked handle between them: a copy.

    A root has a namespace, no pages and no parent. Counts and times are those of all uses that ran through the run.
    locks: how many locked handles protect it. anchors: how many of them end with it.
    """

    parent: PageRun | None
    namespace: Namespace
    last: HashedPage
    members: list[HashedPage] = field(default_factory=list)
    children: list[PageRun] = field(default_factory=list)
    locks: int = 0
    last_access: int = 0
    num_hits: int = 0

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


def token_array(token_bytes: bytes) -> TokenArray:
    """Token ids from the bytes of their pages; not to be written to."""
    return np.frombuffer(token_bytes, "<i8").astype(np.int64, copy=False)
