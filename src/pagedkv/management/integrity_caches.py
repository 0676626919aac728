"""What a prefix cache says of itself, compared with those who lock it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError
from .prefix_cache import CacheHandle, Namespace, PrefixCache, namespace_key

__all__ = ["CacheView", "LockHolder", "WindowCacheView", "require", "view_cache"]

Ids = npt.NDArray[np.int64]


class LockHolder(Protocol):
    """A live sequence or a pin."""

    @property
    def namespace(self) -> Namespace:
        """Where it is cached."""

    @property
    def cache(self) -> PrefixCache | None:
        """What it locks."""

    @property
    def lock_handle(self) -> CacheHandle | None:
        """How far."""


class CacheView:
    """The nodes of a prefix cache at one moment, checked, with the pages they hold by page id."""

    def __init__(self, cache: PrefixCache, num_pages: int) -> None:
        self.cache = cache
        if hasattr(cache, "sanity_check"):
            cache.sanity_check()
        self._nodes = list(cache.nodes())
        self._roots: dict[Any, Any] = {}
        self._children: dict[tuple[int, bytes], Any] = {}
        for node in self._nodes:
            self._file(node)
        sentence = "no page is at two positions of the prefix cache"
        pages = np.concatenate([np.empty(0, np.int64), *(node.pages for node in self._nodes)])
        require(not ((pages < 0) | (pages >= num_pages)).any(), sentence, f"pages outside 0..{num_pages - 1}")
        self.held: Ids = np.bincount(pages, minlength=num_pages).astype(np.int64)

    def locked(self, holder: LockHolder) -> tuple[Ids, Ids]:
        """Token and page ids of the prefix that a holder locks, -1 for pages that its lock does not protect."""
        path = self._path(holder)
        none = np.empty(0, np.int64)
        return (
            np.concatenate([none, *(node.tokens for node in path)]),
            np.concatenate([none, *(node.pages for node in path)]),
        )

    def check_locks(self, holders: Sequence[LockHolder]) -> None:
        """Every lock has its holder, at its node and at all above."""
        sentence = "every lock of the prefix cache is held by a live sequence or a pin"
        anchors: Counter[int] = Counter()
        locks: Counter[int] = Counter()
        for path in map(self._path, holders):
            anchors.update(id(node) for node in path[-1:])
            locks.update(id(node) for node in path)
        for node in self._nodes:
            found, expected = (node.locks, node.anchors), (locks[id(node)], anchors[id(node)])
            require(
                node.parent is None or found == expected,
                sentence,
                f"the node of pages {node.pages.tolist()} is locked {found[0]} times, {found[1]} by name, "
                f"but live sequences and pins lock it {expected[0]} times, {expected[1]} by name",
            )

    def check_counters(self) -> None:
        """Pages cached, evictable and marked as held are those of the nodes."""
        sentence, cache = "the cache counts what its nodes hold", self.cache
        num_cached = int(self.held.sum())
        num_evictable = sum(node.num_pages for node in self._nodes if node.locks == 0)
        require(cache.num_cached_pages == num_cached, sentence, f"{cache.num_cached_pages} counted, {num_cached} held")
        counted = cache.num_evictable_pages
        require(counted == num_evictable, sentence, f"{counted} counted as evictable, {num_evictable} are")
        marked = cache.held_mask(self.held.shape[0])
        for page in np.flatnonzero(marked != (self.held > 0))[:1]:
            require(False, sentence, f"page {page} is {'not ' if marked[page] else ''}in a node but marked otherwise")

    def _file(self, node: Any) -> None:
        sentence = "a node of the prefix cache has whole pages, and none beside it begins with the same page"
        fits = node.pages.size == node.num_pages and node.tokens.size == node.num_pages * self.cache.page_size
        evidence = f"a node of {node.num_pages} pages holds {node.pages.size} pages and {node.tokens.size} tokens"
        require(fits and (node.num_pages > 0) == (node.parent is not None), sentence, evidence)
        if node.parent is None:
            self._roots[namespace_key(node.namespace)] = node
            return
        key = id(node.parent), self._first_page(node.tokens)
        require(
            key not in self._children, sentence, f"the node of pages {node.pages.tolist()} is the second of its kind"
        )
        self._children[key] = node

    def _path(self, holder: LockHolder) -> list[Any]:
        """The nodes under a lock, from the first page on."""
        handle = holder.lock_handle
        if handle is None:
            return []
        sentence = "every lock of the prefix cache is held by a live sequence or a pin"
        left = self.cache.locked_tokens(handle, 0)
        evidence = f"{holder} locks {left.size} tokens under a handle of {handle.num_tokens}"
        require(left.size == handle.num_tokens, sentence, evidence)
        node, path = self._roots.get(namespace_key(holder.namespace)), []
        while left.size and node is not None:
            node = self._children.get((id(node), self._first_page(left)))
            if node is not None and np.array_equal(left[: node.tokens.size], node.tokens):
                path.append(node)
                left = left[node.tokens.size :]
            else:
                break
        require(not left.size, sentence, f"{holder} locks {left.size} tokens that are not in the cache as nodes")
        return path

    def _first_page(self, tokens: Ids) -> bytes:
        return np.asarray(tokens[: self.cache.page_size], np.int64).tobytes()


class WindowCacheView(CacheView):
    """The same of a cache that keeps what a window sees: pages may be missing, and a lock protects the last ones.

    The cache proves itself which pages the handles that are locked protect (`sanity_check`).
    """

    def locked(self, holder: LockHolder) -> tuple[Ids, Ids]:
        """Token and page ids of the prefix that a holder locks, -1 for pages that its lock does not protect."""
        handle = holder.lock_handle
        if handle is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        page_size, window = self.cache.page_size, int(self.cache.window)  # type: ignore[attr-defined]
        pages, node = np.full(handle.num_tokens // page_size, -1, np.int64), handle.node
        first = max(0, pages.shape[0] - -(-(window - 1) // page_size))
        for position in reversed(range(first, pages.shape[0])):
            pages[position], node = node.page, node.parent
        return self.cache.locked_tokens(handle, 0), pages

    def check_locks(self, holders: Sequence[LockHolder]) -> None:
        """Every handle that is locked has its holders."""
        sentence = "every lock of the prefix cache is held by a live sequence or a pin"
        expected = Counter(id(holder.lock_handle.node) for holder in holders if holder.lock_handle is not None)
        for node in self._nodes:
            found = node.anchors if node.parent is not None else 0
            evidence = (
                f"the node of pages {node.pages.tolist()} is locked {found} times by name, "
                f"but live sequences and pins lock it {expected[id(node.last)]} times"
            )
            require(node.parent is None or found == expected[id(node.last)], sentence, evidence)

    def _file(self, node: Any) -> None:
        sentence = "a node of the prefix cache has whole pages, and none beside it begins with the same page"
        fits = node.pages.size == node.num_pages and node.tokens.size == node.num_pages * self.cache.page_size
        evidence = f"a node of {node.num_pages} pages holds {node.pages.size} pages and {node.tokens.size} tokens"
        require(fits and (node.num_pages > 0) == (node.parent is not None), sentence, evidence)


def view_cache(cache: PrefixCache, num_pages: int) -> CacheView:
    """The view of a cache of its kind."""
    is_windowed = getattr(cache, "window", None) is not None
    return (WindowCacheView if is_windowed else CacheView)(cache, num_pages)


def require(holds: bool, sentence: str, evidence: str) -> None:
    """Raises the IntegrityError of a sentence that does not hold."""
    if not holds:
        raise IntegrityError(f"broken: {sentence}: {evidence}.")
