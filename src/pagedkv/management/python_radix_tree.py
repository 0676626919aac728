"""The radix tree in Python: what the native core does, to be read, and to run where there is no native core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.compare_key import common_prefix_len
from .allocator import PageArray, PageIds
from .eviction import EvictionPolicy, EvictionQueue
from .prefix_cache import EMPTY_HANDLE, CacheHandle, MatchResult, Namespace
from .radix_node import RadixNode
from .radix_tree import Growth, as_page_array
from .token_ids import TokenArray, TokenIds, as_token_ids

__all__ = ["PythonRadixTree"]

_TOKEN_BYTES = 8


class PythonRadixTree:
    """A RadixTree of `RadixNode`s, which are also its roots and what handles name.

    A path is what a walk passed: nodes in order, and how many pages of the last one agreed.
    """

    node_type: type[Any] = RadixNode

    def __init__(self, page_size: int, policy: EvictionPolicy, first_version: int = 0) -> None:
        self.page_size = page_size
        self.num_cached_pages = self.num_evictable_pages = 0
        self._queue: EvictionQueue[RadixNode] = EvictionQueue(policy)
        self.roots: dict[Any, RadixNode] = {}
        self._all_roots: set[RadixNode] = set()
        self._empty_roots: list[RadixNode] = []
        self._time = 0
        self._first_version = first_version
        # By page id: 0 when the cache does not hold the page. Grown to the largest id seen.
        self._held = np.zeros(64, np.int32)

    @property
    def policy(self) -> EvictionPolicy:
        """Who decides what goes first."""
        return self._queue.policy

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays of all nodes; not of the objects around them."""
        return sum(node.num_bytes for node in self.nodes())

    def add_root(self, namespace: Namespace) -> RadixNode:
        """A root without nodes."""
        empty = np.empty(0, np.int64), np.empty(0, np.int32)
        root = RadixNode(None, *empty, self.page_size, self._time, namespace=namespace)
        self._empty_roots.append(root)
        self._all_roots.add(root)
        return root

    def drop_root(self, root: RadixNode) -> None:
        """Forgets a root without nodes."""
        self._all_roots.discard(root)
        self._empty_roots.remove(root)

    def empty_root(self) -> RadixNode | None:
        """A root without nodes, or None."""
        return self._empty_roots[-1] if self._empty_roots else None

    def namespace_of(self, root: RadixNode) -> Namespace:
        """What `add_root` was given."""
        namespace: Namespace = root.namespace
        return namespace

    def match(self, root: RadixNode | None, token_ids: TokenIds) -> MatchResult:
        """The longest cached prefix below a root."""
        ids = as_token_ids("token_ids", token_ids)
        if root is None:
            self._time += 1
            return MatchResult(0, np.empty(0, np.int32), EMPTY_HANDLE)
        path, _, num_in_last = self._find(root, 0, ids)
        end = self._use(root, path, num_in_last, num_hits=1)
        pages = np.concatenate([np.empty(0, np.int32), *(node.pages for node in path)])
        self._queue.offer(end)
        return MatchResult(pages.shape[0] * self.page_size, pages, self._handle(end, pages.shape[0] * self.page_size))

    def insert(self, root: RadixNode, token_ids: TokenIds, pages: PageIds, only_new: bool, priority: int) -> Growth:
        """Adds a prefix below a root."""
        ids = as_token_ids("token_ids", token_ids)
        return self._insert_below(root, 0, ids, self._checked_pages(ids, pages), only_new, priority)

    def extend(self, handle: CacheHandle, token_ids: TokenIds, pages: PageIds, only_new: bool, priority: int) -> Growth:
        """Adds tokens behind a prefix."""
        ids = as_token_ids("token_ids", token_ids)
        taken = self._checked_pages(ids, pages)
        start = self._end_of(self._current_node(handle), handle.num_tokens)
        growth = self._insert_below(start, handle.num_tokens, ids, taken, only_new, priority)
        # A walk that began inside a node may have split it.
        for node in _upwards(self._end_of(start, handle.num_tokens)):
            node.last_access = self._time
            node.priority = max(node.priority, priority)
        self._queue.offer(start)
        return growth

    def lock(self, handle: CacheHandle) -> None:
        """Protects a prefix from eviction: the node that the handle says and all above it."""
        named = self._current_node(handle)
        named.anchors += 1
        for node in _upwards(named):
            if node.parent is not None:
                if node.locks == 0:
                    self.num_evictable_pages -= node.num_pages
                node.locks += 1
        self._queue.offer(named)

    def unlock(self, handle: CacheHandle) -> None:
        """Takes back one lock."""
        named: RadixNode = handle.node
        if named.anchors < 1 or not self._is_current(handle):
            raise ValueError(f"handle must be locked, got one of {handle.num_tokens} tokens that is not.")
        named.anchors -= 1
        self._time += 1
        for node in _upwards(named):
            node.last_access = self._time
            if node.parent is not None:
                node.locks -= 1
                if node.locks == 0:
                    self.num_evictable_pages += node.num_pages
        self._queue.offer(named)

    def ancestor(self, handle: CacheHandle, num_tokens: int) -> CacheHandle:
        """The handle of the first `num_tokens` tokens, at least a page and whole pages."""
        node = self._end_of(self._current_node(handle), num_tokens)
        kept = num_tokens // self.page_size - node.num_before
        return self._handle(node if kept == node.num_pages else self._split(node, kept), num_tokens)

    def locked_tokens(self, handle: CacheHandle, start: int) -> TokenArray:
        """Token ids [start, handle.num_tokens)."""
        parts, end = [np.empty(0, np.int64)], handle.num_tokens
        node = self._end_of(self._current_node(handle), end)
        while end > start:
            assert node.parent is not None  # a root has no tokens, and `start` is not before them
            first = node.num_before * self.page_size
            parts.insert(1, node.tokens[max(0, start - first) : end - first])
            node, end = node.parent, first
        return np.concatenate(parts)

    def evict(self, num_pages: int) -> PageArray:
        """Drops up to `num_pages` pages and returns them."""
        dropped = [np.empty(0, np.int32)]
        missing = num_pages
        while missing > 0 and (node := self._first_to_go(missing < num_pages)) is not None:
            pages = self._trim(node, missing) if node.num_pages > missing else self._remove(node)
            missing -= pages.shape[0]
            dropped.append(pages)
        pages = np.concatenate(dropped)
        self._held[pages] = 0
        self.num_cached_pages -= pages.shape[0]
        self.num_evictable_pages -= pages.shape[0]
        return pages

    def holds(self, pages: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of `pages` are in the trees."""
        known = (pages >= 0) & (pages < self._held.shape[0])
        result = np.zeros(pages.shape, np.bool_)
        result[known] = self._held[pages[known]] != 0
        return result

    def held_pages(self) -> PageArray:
        """All pages, the least first."""
        return self._held.nonzero()[0].astype(np.int32)

    def held_mask(self, num_pages: int) -> npt.NDArray[np.bool_]:
        """For each page 0..num_pages-1 whether it is in the trees."""
        mask = np.zeros(num_pages, np.bool_)
        known = self._held[:num_pages]
        mask[: known.shape[0]] = known != 0
        return mask

    def nodes(self) -> Iterator[RadixNode]:
        """Every node, roots with nodes included, parents before children: for inspection, not for change."""
        stack = [root for root in self._all_roots if root.children]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def defect(self) -> str:
        """Nothing: there is no structure beside the nodes but the queue, which they know."""
        return ""

    def _find(self, node: RadixNode, num_before: int, ids: TokenArray) -> tuple[list[RadixNode], int, int]:
        """The path that `ids` take behind the first `num_before` pages of a prompt, which end with or in `node`.

        Follows them as far as whole pages agree, and changes nothing. The path, how many pages agree, and how many of
        its last node are passed then.
        """
        page_size = self.page_size
        stop = ids.shape[0] // page_size * page_size
        raw = ids.tobytes()
        path: list[RadixNode] = []
        start = num_pages = 0
        num_passed = num_before - node.num_before
        if num_passed < node.num_pages:
            num_found = common_prefix_len(node.tokens[num_passed * page_size :], ids[:stop]) // page_size
            path.append(node)
            num_pages = num_passed + num_found
            start = num_found * page_size
            if num_pages < node.num_pages:
                return path, num_found, num_pages
        while start < stop:
            key = raw[start * _TOKEN_BYTES : (start + page_size) * _TOKEN_BYTES]
            child = node.children.get(key)
            if child is None:
                break
            num_pages = common_prefix_len(child.tokens, ids[start:stop]) // page_size
            path.append(child)
            start += num_pages * page_size
            if num_pages < child.num_pages:
                break
            node = child
        return path, start // page_size, num_pages

    def _use(self, start: RadixNode, path: list[RadixNode], num_in_last: int, num_hits: int) -> RadixNode:
        """Stamps a path, and splits its last node where the walk left it; returns where it ends now."""
        self._time = start.last_access = self._time + 1
        if path and num_in_last < path[-1].num_pages:
            path[-1] = self._split(path[-1], num_in_last)
        for node in path:
            node.last_access = self._time
            node.num_hits += num_hits
        return path[-1] if path else start

    def _insert_below(
        self, start: RadixNode, start_tokens: int, ids: TokenArray, pages: PageArray, only_new: bool, priority: int
    ) -> Growth:
        path, num_cached, num_in_last = self._find(start, start_tokens // self.page_size, ids)
        new_pages = pages[num_cached:] if not (only_new and num_cached) else pages[:0]
        if new_pages.size:
            self._hold(new_pages)
        end = self._use(start, path, num_in_last, num_hits=0)
        for node in path:
            node.priority = max(node.priority, priority)
        parent_page = int(end.pages[-1]) if end.num_pages else None
        if new_pages.size:
            new_ids = ids[num_cached * self.page_size : pages.shape[0] * self.page_size]
            is_own = end is start and not end.children and end.anchors == 1
            end = self._add(end, new_ids, new_pages, is_own, priority)
        self._queue.offer(end)
        num_tokens = start_tokens + (num_cached + new_pages.shape[0]) * self.page_size
        root = next(node for node in _upwards(end) if node.parent is None)
        return Growth(num_cached * self.page_size, self._handle(end, num_tokens), parent_page, root)

    def _add(self, end: RadixNode, ids: TokenArray, pages: PageArray, is_own: bool, priority: int) -> RadixNode:
        """Puts new pages behind `end`: into it when nobody else knows it, otherwise below it."""
        self.num_cached_pages += pages.shape[0]
        if is_own:
            end.grow(ids, pages)
            return end
        if end.parent is None and not end.children:
            self._empty_roots.remove(end)
        leaf = RadixNode(end, ids, pages, self.page_size, self._time)
        leaf.priority, leaf.version = priority, self._first_version
        end.children[leaf.child_key] = leaf
        self.num_evictable_pages += pages.shape[0]
        self._queue.offer(end)
        return leaf

    def _split(self, node: RadixNode, num_pages: int) -> RadixNode:
        prefix = node.split(num_pages)
        self._queue.offer(node)
        return prefix

    def _first_to_go(self, has_dropped: bool) -> RadixNode | None:
        """The node of least rank, or None; what a policy raises comes out only when nothing was dropped before."""
        try:
            return self._queue.first()
        except Exception:
            if has_dropped:
                return None
            raise

    def _trim(self, node: RadixNode, num_pages: int) -> PageArray:
        pages = node.trim(num_pages)
        self._queue.offer(node)
        return pages

    def _remove(self, node: RadixNode) -> PageArray:
        parent = node.parent
        assert parent is not None  # a root is never evictable
        pages = node.detach()
        self._queue.offer(node)
        self._queue.offer(parent)
        if parent.parent is None and not parent.children:
            self._empty_roots.append(parent)
        return pages

    def _checked_pages(self, ids: TokenArray, pages: PageIds) -> PageArray:
        array = as_page_array(pages)
        num_pages = ids.shape[0] // self.page_size
        if array.shape[0] != num_pages:
            raise ValueError(
                f"pages must have shape [{num_pages}] for {ids.shape[0]} tokens (page_size {self.page_size}), "
                f"got {list(array.shape)}."
            )
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

    @staticmethod
    def _handle(node: RadixNode, num_tokens: int) -> CacheHandle:
        return CacheHandle(node, node.version, num_tokens) if num_tokens else EMPTY_HANDLE

    def _is_current(self, handle: CacheHandle) -> bool:
        """Whether the node is still the one that was named, and holds the end of the prefix or is behind it."""
        node: RadixNode = handle.node
        num_pages, rest = divmod(handle.num_tokens, self.page_size)
        is_same = handle.version == node.version >= self._first_version
        return is_same and rest == 0 and 0 < num_pages <= node.num_before + node.num_pages

    def _end_of(self, node: RadixNode, num_tokens: int) -> RadixNode:
        """The node that holds the last of the first `num_tokens` tokens of a prefix that ends with `node`."""
        while node.num_before * self.page_size >= num_tokens:
            assert node.parent is not None  # nothing is before a root
            node = node.parent
        return node

    def _current_node(self, handle: CacheHandle) -> RadixNode:
        node: RadixNode = handle.node
        if not self._is_current(handle):
            raise ValueError(
                f"handle must name a prefix that is still cached, got one of {handle.num_tokens} tokens that changed. "
                "Lock a handle before the next insert or eviction."
            )
        return node


def _upwards(node: RadixNode | None) -> Iterator[RadixNode]:
    """A node, what is above it, and the root at last."""
    while node is not None:
        yield node
        node = node.parent
