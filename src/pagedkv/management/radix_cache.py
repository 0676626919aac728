"""The prefix cache's index: which pages hold the keys and values of which runs of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..kernels.compare_key import common_prefix_len
from ..shapes import check_int
from .allocator import PageArray, PageIds
from .eviction import EvictionPolicy, EvictionQueue, make_eviction_policy
from .radix_node import RadixNode
from .token_ids import TokenArray, TokenIds, as_token_ids

__all__ = ["CacheHandle", "InsertResult", "MatchResult", "Namespace", "RadixCache", "namespace_key"]

# Who may share with whom, compared by value and type: None, "", 0, False and b"" are five namespaces.
Namespace = str | bytes | int | tuple[Any, ...] | None

_TOKEN_BYTES = 8


class CacheHandle(NamedTuple):
    """Names the deepest node of a cached prefix; opaque. `num_tokens` is the length of the prefix."""

    node: RadixNode
    version: int
    num_tokens: int


class MatchResult(NamedTuple):
    """The longest cached prefix: `pages` [num_tokens / page_size] int32, a copy."""

    num_tokens: int
    pages: PageArray
    handle: CacheHandle


class InsertResult(NamedTuple):
    """`num_cached` tokens were there before, on pages of the cache's; `handle` names the whole run."""

    num_cached: int
    handle: CacheHandle


class RadixCache:
    """A radix tree over whole pages, one root a namespace.

    Units:  lookups and inserts round down to whole pages; counters count pages.
    When:   a result may be used until the next call that inserts or evicts; lock its handle to use it longer.
    Owns:   copies of token and page ids. Whether a page is free is the allocator's business: a page given to `insert`
            belongs to the cache until `evict` or `reset` returns it.
    Cost:   match and insert: the tokens compared, and a step a node. lock and unlock: a step a node. evict: a heap
            operation a leaf, never a walk of the tree.
    Raises: ValueError, TypeError for misuse; nothing has changed then.

    >>> cache = RadixCache(page_size=2)
    >>> cache.insert([1, 2, 3, 4], [7, 5]).num_cached
    0
    >>> cache.match([1, 2, 3, 9])[:2]
    (2, array([7], dtype=int32))
    >>> cache.evict(1)
    array([5], dtype=int32)
    """

    def __init__(self, page_size: int, eviction: str | EvictionPolicy = "lru") -> None:
        check_int("page_size", page_size, minimum=1)
        self.page_size = page_size
        self._queue: EvictionQueue[RadixNode] = EvictionQueue(make_eviction_policy(eviction))
        self._roots: dict[Any, RadixNode] = {}
        # What a handle of an unknown namespace names; it stays empty.
        self._void = self._new_root(None)
        self._time = 0
        self._num_cached_pages = self._num_evictable_pages = 0
        # By page id: 0 when the cache does not hold the page. Grown to the largest id seen.
        self._held = np.zeros(64, np.int32)

    @property
    def num_cached_pages(self) -> int:
        """Pages in the tree."""
        return self._num_cached_pages

    @property
    def num_evictable_pages(self) -> int:
        """Pages in nodes that nothing locks; `evict` can free all of them."""
        return self._num_evictable_pages

    @property
    def eviction_policy(self) -> EvictionPolicy:
        """Who decides what goes first."""
        return self._queue.policy

    def match(self, token_ids: TokenIds, namespace: Namespace = None) -> MatchResult:
        """The longest cached prefix of `token_ids`, in whole pages; counts as a use of it."""
        ids = as_token_ids("token_ids", token_ids)
        root = self._roots.get(namespace_key(namespace), self._void)
        node, parts = self._walk(root, ids, num_hits=1)
        self._queue.offer(node)
        pages = np.concatenate(parts) if parts else np.empty(0, np.int32)
        num_tokens = pages.shape[0] * self.page_size
        return MatchResult(num_tokens, pages, CacheHandle(node, node.version, num_tokens))

    def insert(
        self, token_ids: TokenIds, pages: PageIds, namespace: Namespace = None, *, only_new: bool = False
    ) -> InsertResult:
        """Adds the prefix `token_ids`, whose keys and values are in `pages`; what is there already stays as it is.

        only_new: adds nothing at all when the beginning is there already, so that the result never stands on pages of
                others; `num_cached` tells.

        Shapes: token_ids [n]; pages [n // page_size]. The pages of the first `num_cached` tokens of the result are not
                taken, they stay the caller's; the others are the cache's from now on.
        Raises: ValueError when a page to be taken is negative, named twice or in the cache already.
        """
        ids = as_token_ids("token_ids", token_ids)
        taken = self._checked_pages(ids, pages)
        key = namespace_key(namespace)
        root = self._roots.get(key) or self._new_root(key)
        result = self._insert_below(root, 0, ids, taken, only_new)
        if root.children:
            self._roots[key] = root
        return result

    def extend(
        self, handle: CacheHandle, token_ids: TokenIds, pages: PageIds, *, only_new: bool = False
    ) -> InsertResult:
        """The same as inserting what `handle` names followed by `token_ids`, from there on.

        Counts in `num_cached` are those of `token_ids`. A leaf that only `handle` locks grows in place: the handle's
        lock then covers the new pages too, and a sequence that is decoded page by page stays one node.
        """
        self._check_current(handle)
        ids = as_token_ids("token_ids", token_ids)
        taken = self._checked_pages(ids, pages)
        if handle.num_tokens == 0:
            raise ValueError("handle must name a cached prefix to be extended, got an empty one. Insert instead.")
        result = self._insert_below(handle.node, handle.num_tokens, ids, taken, only_new)
        above = handle.node.parent
        while above is not None:
            above.last_access = self._time
            above = above.parent
        return result

    def lock(self, handle: CacheHandle) -> None:
        """Protects the prefix that `handle` names from eviction until it is unlocked as often; none if empty."""
        self._check_current(handle)
        node = handle.node
        if node.parent is None:
            return
        node.anchors += 1
        while node.parent is not None:
            if node.locks == 0:
                self._num_evictable_pages -= node.num_pages
            node.locks += 1
            node = node.parent

    def unlock(self, handle: CacheHandle) -> None:
        """Takes back one `lock` of the same handle; counts as a use of the prefix.

        Raises: ValueError when the handle is not locked.
        """
        node = handle.node
        if handle.num_tokens == 0:
            return
        if node.anchors < 1:
            raise ValueError(f"handle must be locked, got one of {handle.num_tokens} tokens that is not.")
        node.anchors -= 1
        self._time += 1
        while node.parent is not None:
            node.locks -= 1
            node.last_access = self._time
            if node.locks == 0:
                self._num_evictable_pages += node.num_pages
            node = node.parent
        node.last_access = self._time
        self._queue.offer(handle.node)

    def ancestor(self, handle: CacheHandle, num_tokens: int) -> CacheHandle:
        """The handle of the first `num_tokens` tokens (whole pages) of a current handle's prefix."""
        self._check_current(handle)
        check_int("num_tokens", num_tokens, minimum=0)
        if num_tokens % self.page_size or num_tokens > handle.num_tokens:
            raise ValueError(
                f"num_tokens must be whole pages of {self.page_size} and at most {handle.num_tokens}, got {num_tokens}."
            )
        node, start = handle.node, handle.num_tokens
        while (parent := node.parent) is not None:
            start -= node.num_pages * self.page_size
            if start < num_tokens:
                kept = (num_tokens - start) // self.page_size
                node = node if kept == node.num_pages else node.split(kept)
                break
            node = parent
        return CacheHandle(node, node.version, num_tokens)

    def locked_tokens(self, handle: CacheHandle, start: int) -> TokenArray:
        """Token ids [start, handle.num_tokens) of the prefix that a locked or current handle names."""
        parts, node, end = [np.empty(0, np.int64)], handle.node, handle.num_tokens
        while node.parent is not None and end > start:
            parts.insert(1, node.tokens)
            end -= node.num_pages * self.page_size
            node = node.parent
        return np.concatenate(parts)[max(0, start - end) :]

    def evict(self, num_pages: int) -> PageArray:
        """Drops up to `num_pages` pages that nothing locks and returns them: fewer when there are no more.

        Order: by the eviction policy; of each run the last pages first, so that what is left is still a prefix.
        """
        check_int("num_pages", num_pages, minimum=0)
        dropped: list[PageArray] = []
        missing = num_pages
        while missing > 0 and (node := self._queue.pop()) is not None:
            pages = self._trim(node, missing) if node.num_pages > missing else self._remove(node)
            missing -= pages.shape[0]
            dropped.append(pages)
        pages = np.concatenate(dropped) if dropped else np.empty(0, np.int32)
        self._held[pages] = 0
        self._num_cached_pages -= pages.shape[0]
        self._num_evictable_pages -= pages.shape[0]
        return pages

    def reset(self) -> PageArray:
        """Drops everything and returns the pages. Raises: ValueError while a handle is locked."""
        num_locked = self._num_cached_pages - self._num_evictable_pages
        if num_locked:
            raise ValueError(f"the cache must not be locked to be reset, got {num_locked} locked pages.")
        return self.evict(self._num_cached_pages)

    def holds(self, pages: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of `pages` are in the tree."""
        known = pages < self._held.shape[0]
        result = np.zeros(pages.shape, np.bool_)
        result[known] = self._held[pages[known]] != 0
        return result

    def held_mask(self, num_pages: int) -> npt.NDArray[np.bool_]:
        """For each page 0..num_pages-1 whether it is in the tree."""
        mask = np.zeros(num_pages, np.bool_)
        known = self._held[:num_pages]
        mask[: known.shape[0]] = known != 0
        return mask

    def nodes(self) -> Iterator[RadixNode]:
        """Every node, roots included, parents before children: for inspection, not for change."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _walk(self, node: RadixNode, ids: TokenArray, num_hits: int) -> tuple[RadixNode, list[PageArray]]:
        """Follows `ids` down as far as whole pages agree, splitting the last node if need be; stamps what it passes."""
        page_size = self.page_size
        stop = ids.shape[0] // page_size * page_size
        raw = ids.tobytes()
        key_bytes = page_size * _TOKEN_BYTES
        self._time = node.last_access = self._time + 1
        parts: list[PageArray] = []
        start = 0
        while start < stop:
            child = node.children.get(raw[start * _TOKEN_BYTES : start * _TOKEN_BYTES + key_bytes])
            if child is None:
                break
            num_pages = common_prefix_len(child.tokens, ids[start:stop]) // page_size
            is_part = num_pages < child.num_pages
            node = child.split(num_pages) if is_part else child
            node.last_access = self._time
            node.num_hits += num_hits
            parts.append(node.pages)
            start += num_pages * page_size
            if is_part:
                break
        return node, parts

    def _insert_below(
        self, start: RadixNode, start_tokens: int, ids: TokenArray, pages: PageArray, only_new: bool
    ) -> InsertResult:
        node, parts = self._walk(start, ids, num_hits=0)
        num_cached = sum(part.shape[0] for part in parts)
        new_pages = pages[num_cached:] if not (only_new and num_cached) else pages[:0]
        num_tokens = start_tokens + (num_cached + new_pages.shape[0]) * self.page_size
        if new_pages.size:
            self._hold(new_pages)
            new_ids = ids[num_cached * self.page_size : pages.shape[0] * self.page_size]
            self._num_cached_pages += new_pages.shape[0]
            if node is start and start_tokens and not node.children and node.locks == node.anchors == 1:
                node.grow(new_ids, new_pages)
            else:
                leaf = RadixNode(node, new_ids, new_pages, self.page_size, self._time)
                node.children[leaf.child_key] = leaf
                self._num_evictable_pages += new_pages.shape[0]
                node = leaf
        self._queue.offer(node)
        return InsertResult(num_cached * self.page_size, CacheHandle(node, node.version, num_tokens))

    def _checked_pages(self, ids: TokenArray, pages: PageIds) -> PageArray:
        array = pages if isinstance(pages, np.ndarray) else np.array(pages, dtype=None if len(pages) else np.int32)
        if array.ndim != 1 or array.shape[0] != ids.shape[0] // self.page_size:
            raise ValueError(
                f"pages must have shape [{ids.shape[0] // self.page_size}] for {ids.shape[0]} tokens "
                f"(page_size {self.page_size}), got {list(array.shape)}."
            )
        if array.dtype.kind != "i":
            raise TypeError(f"pages must be integers, got {array.dtype.name}.")
        if array.size and (array.min() < 0 or array.max() > 2**31 - 2):
            raise ValueError(f"pages must be in 0..2**31 - 2, got {array.min()}..{array.max()}.")
        return array.astype(np.int32, copy=False)

    def _hold(self, pages: PageArray) -> None:
        """Marks `pages` as held; refuses, and marks nothing, when one is held already or named twice."""
        largest = int(pages.max())
        if largest >= self._held.shape[0]:
            grown = np.zeros(max(largest + 1, 2 * self._held.shape[0]), np.int32)
            grown[: self._held.shape[0]] = self._held
            self._held = grown
        held = self._held[pages] != 0
        if held.any():
            page = int(pages[int(held.argmax())])
            raise ValueError(
                f"pages must not be in the cache yet, got page {page}, which is there under other tokens. "
                "Commit the same token ids for pages that sequences share."
            )
        # Each entry writes its position at its page; of two equal entries only the last finds its own again.
        positions = np.arange(1, pages.shape[0] + 1, dtype=np.int32)
        self._held[pages] = positions
        repeated = self._held[pages] != positions
        if repeated.any():
            self._held[pages] = 0
            raise ValueError(f"pages must name each page once, got page {pages[int(repeated.argmax())]} twice.")

    def _trim(self, node: RadixNode, num_pages: int) -> PageArray:
        pages = node.trim(num_pages)
        self._queue.offer(node)
        return pages

    def _remove(self, node: RadixNode) -> PageArray:
        parent = node.parent
        pages = node.detach()
        if parent is not None and parent.parent is not None:
            self._queue.offer(parent)
        elif parent is not None and not parent.children:
            del self._roots[parent.namespace]
            parent.version += 1
        return pages

    def _new_root(self, key: Any) -> RadixNode:
        return RadixNode(None, np.empty(0, np.int64), np.empty(0, np.int32), self.page_size, 0, namespace=key)

    @staticmethod
    def _check_current(handle: CacheHandle) -> None:
        if handle.version != handle.node.version:
            raise ValueError(
                f"handle must name a prefix that is still cached, got one of {handle.num_tokens} tokens that changed. "
                "Lock a handle before the next insert or eviction."
            )


def namespace_key(namespace: object) -> Any:
    """A dict key that is equal only for equal values of equal types, at every depth of a tuple."""
    if isinstance(namespace, tuple):
        return (tuple, tuple(map(namespace_key, namespace)))
    if namespace is None or type(namespace) in (str, bytes, int, bool):
        return (type(namespace), namespace)
    raise TypeError(
        f"namespace must be None, a str, bytes, an int or a tuple of these, got {type(namespace).__name__}."
    )
