"""What the locks of a hashed cache with a window protect."""

from __future__ import annotations

from collections import deque

from .hashed_page import WindowPage

__all__ = ["LockSpan", "lock_span", "unlock_span"]


class LockSpan:
    """Pages that follow each other, in their order: those that the locked handles of one page need.

    Or of two pages, `ends`, the second less than a window behind the first. So a lock moves on by a page in two steps,
    however long the window is: the new end comes, then the old one goes and takes the first page along.

    newest: no page of it came later than this.
    """

    __slots__ = ("ends", "newest", "pages")

    def __init__(self) -> None:
        self.pages: deque[WindowPage] = deque()
        self.ends: list[WindowPage] = []
        self.newest = 0


def lock_span(end: WindowPage, window_pages: int) -> int:
    """One more locked handle of `end`, whose needed pages are there; returns how many were not locked before.

    Cost: a step for each page behind the nearest lock that can move on to `end`, or for each that is needed.
    """
    end.anchors += 1
    if end.anchors > 1:
        return 0
    num_needed = end.position + 1 if end.position < window_pages else window_pages
    behind: list[WindowPage] = []
    page: WindowPage | None = end
    while len(behind) < num_needed and page is not None and page.span is None:
        behind.append(page)
        page = page.parent
    span = page.span if page is not None and len(behind) < num_needed else None
    if span is None or len(span.ends) > 1:
        span = LockSpan()
        while len(behind) < num_needed and page is not None:
            behind.append(page)
            page = page.parent
    end.span = span
    span.ends.append(end)
    num_new = 0
    for page in reversed(behind):
        span.pages.append(page)
        if page.created > span.newest:
            span.newest = page.created
        page.locks += 1
        if page.locks == 1:
            num_new += 1
    return num_new


def unlock_span(end: WindowPage, window_pages: int) -> list[WindowPage]:
    """One locked handle of `end` less; returns the pages that nothing locks any more."""
    end.anchors -= 1
    span = end.span
    if end.anchors or span is None:
        return []
    end.span = None
    span.ends.remove(end)
    num_left = min(window_pages, span.ends[0].position + 1) if span.ends else 0
    # An end behind the one that is left takes its pages from the end, one before it from the beginning.
    pop = span.pages.pop if span.ends and span.ends[0].position < end.position else span.pages.popleft
    freed: list[WindowPage] = []
    while len(span.pages) > num_left:
        page = pop()
        page.locks -= 1
        if not page.locks:
            freed.append(page)
    return freed
