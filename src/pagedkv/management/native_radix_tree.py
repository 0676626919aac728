"""The radix tree of the native core: one call across a match, an insert or an eviction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..kernels.cpu import native
from .allocator import PageArray, PageIds
from .eviction import (
    EvictionPolicy,
    FIFOPolicy,
    FILOPolicy,
    LFUPolicy,
    LRUPolicy,
    MRUPolicy,
    PriorityPolicy,
    SLRUPolicy,
)
from .prefix_cache import EMPTY_HANDLE, CacheHandle, MatchResult, Namespace
from .radix_node import RadixNode
from .radix_tree import Growth, as_page_array
from .token_ids import TokenArray, TokenIds, as_plain_token_array

__all__ = ["NativeRadixTree"]

# In the order of csrc/radix_tree.h; a policy of any other class is asked through a call.
_NATIVE_POLICIES = (LRUPolicy, LFUPolicy, FIFOPolicy, MRUPolicy, FILOPolicy, SLRUPolicy, PriorityPolicy)

# Where calls leave what is more than one number, and the columns of "describe": as in csrc/radix_tree_api.cpp.
_NUM_CACHED, _NUM_EVICTABLE, _EMPTY_ROOT, _NODE, _VERSION, _NUM_TOKENS, _PARENT_PAGE, _ROOT, _STATE_SIZE = range(9)
_COLUMNS = (
    "id",
    "parent",
    "num_pages",
    "locks",
    "anchors",
    "version",
    "created",
    "last_access",
    "num_hits",
    "priority",
    "queued_serial",
    "num_bytes",
)

# What the core reads as it lies, if it likes the rest of it too; anything else is looked at in Python first.
_ARRAYS = (np.ndarray, torch.Tensor)


class _Run(NamedTuple):
    """What a policy of a user sees of a leaf."""

    num_pages: int
    created: int
    last_access: int
    num_hits: int
    priority: int
    is_evictable: bool = True


class NativeRadixTree:
    """A RadixTree in the native core; roots and nodes are numbers.

    The core reads arrays of 32 or 64 bit integers where they lie. What it cannot read makes no difference to it; it
    answers -1 and is given a copy, unless the checks in Python refuse it with words.
    """

    node_type: type[Any] = int

    def __init__(self, page_size: int, policy: EvictionPolicy, first_version: int = 0) -> None:
        self.page_size = page_size
        self.policy = policy
        is_native = type(policy) in _NATIVE_POLICIES
        order = _NATIVE_POLICIES.index(type(policy)) if is_native else len(_NATIVE_POLICIES)
        # The core writes here for as long as it lives, and the array lives as long as this object.
        self._state_array = np.zeros(_STATE_SIZE, np.int64)
        self._state_array[_EMPTY_ROOT] = -1
        self._state = memoryview(self._state_array)  # type: ignore[arg-type]
        self.roots: dict[Any, int] = {}
        self._namespaces: dict[int, Namespace] = {}
        self._raised: list[BaseException] = []
        # Not a method: the core would keep this object alive, and this object the core.
        rank = None if is_native else partial(_rank, policy, self._raised)
        calls = native.core().make_radix_tree(page_size, order, rank, first_version, self._state_array)
        self._calls: dict[str, Any] = {
            str(name): call if is_native else partial(_call_and_raise, call, self._raised)
            for name, call in calls.items()
        }
        self._match, self._insert, self._extend = (self._calls[name] for name in ("match", "insert", "extend"))
        self._lock, self._unlock, self._evict = (self._calls[name] for name in ("lock", "unlock", "evict"))

    @property
    def num_cached_pages(self) -> int:
        """Pages in the trees."""
        return self._state[_NUM_CACHED]

    @property
    def num_evictable_pages(self) -> int:
        """Pages in nodes that nothing locks."""
        return self._state[_NUM_EVICTABLE]

    @property
    def num_bytes(self) -> int:
        """Bytes it keeps."""
        return int(self._calls["num_bytes"]())

    def add_root(self, namespace: Namespace) -> int:
        """A root without nodes."""
        root = int(self._calls["add_root"]())
        self._namespaces[root] = namespace
        return root

    def drop_root(self, root: int) -> None:
        """Forgets a root without nodes."""
        self._calls["drop_root"](root)
        self._namespaces.pop(root, None)

    def empty_root(self) -> int | None:
        """A root without nodes, or None."""
        root = self._state[_EMPTY_ROOT]
        return root if root >= 0 else None

    def namespace_of(self, root: int) -> Namespace:
        """What `add_root` was given; None for a root that an interrupt kept from being named."""
        return self._namespaces.get(root)

    def match(self, root: int | None, token_ids: TokenIds) -> MatchResult:
        """The longest cached prefix below a root."""
        if type(token_ids) in _ARRAYS and token_ids.ndim == 1:  # type: ignore[union-attr]
            ids: Any = token_ids
        else:
            ids = as_plain_token_array("token_ids", token_ids)
        room = np.empty(ids.shape[0] // self.page_size, np.int32)
        number = -1 if root is None else root
        try:
            num_tokens = self._match(number, ids, room)
        except _UNREADABLE:
            num_tokens = -1
        if num_tokens < 0:
            num_tokens = self._match(number, as_plain_token_array("token_ids", ids), room)
        if num_tokens == 0:
            return MatchResult(0, room[:0].copy(), EMPTY_HANDLE)
        num_pages = num_tokens // self.page_size
        # A short hit does not keep the room for a long prompt.
        pages = room[:num_pages] if 2 * num_pages >= room.shape[0] else room[:num_pages].copy()
        return MatchResult(num_tokens, pages, CacheHandle(self._state[_NODE], self._state[_VERSION], num_tokens))

    def insert(self, root: int, token_ids: TokenIds, pages: PageIds, only_new: bool, priority: int) -> Growth:
        """Adds a prefix below a root."""
        return self._grown(self._insert, (root,), token_ids, pages, only_new, priority)

    def extend(self, handle: CacheHandle, token_ids: TokenIds, pages: PageIds, only_new: bool, priority: int) -> Growth:
        """Adds tokens behind a prefix."""
        return self._grown(self._extend, handle, token_ids, pages, only_new, priority)

    def extend_leaves(
        self,
        handles: npt.NDArray[np.int64],
        tokens: npt.NDArray[Any],
        token_starts: npt.NDArray[np.int64],
        pages: PageArray,
        page_starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        priorities: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        """Extends leaves in place; see `RadixCache.extend_leaves`."""
        grown = np.zeros(handles.shape[0], np.bool_)
        self._calls["extend_leaves"](handles, tokens, token_starts, pages, page_starts, counts, priorities, grown)
        return grown

    def lock(self, handle: CacheHandle) -> None:
        """Protects a prefix from eviction."""
        self._lock(*handle)

    def unlock(self, handle: CacheHandle) -> None:
        """Takes back one lock."""
        self._unlock(*handle)

    def ancestor(self, handle: CacheHandle, num_tokens: int) -> CacheHandle:
        """The handle of the first `num_tokens` tokens, at least a page and whole pages."""
        self._calls["ancestor"](*handle, num_tokens)
        return CacheHandle(self._state[_NODE], self._state[_VERSION], num_tokens)

    def locked_tokens(self, handle: CacheHandle, start: int) -> TokenArray:
        """Token ids [start, handle.num_tokens)."""
        # No more than there are: the core looks at the handle first.
        num_tokens = min(handle.num_tokens, self._state[_NUM_CACHED] * self.page_size)
        tokens = np.empty(max(0, num_tokens - start), np.int64)
        self._calls["copy_tokens"](*handle, start, tokens)
        return tokens

    def evict(self, num_pages: int) -> PageArray:
        """Drops up to `num_pages` pages and returns them."""
        pages = np.empty(min(num_pages, self._state[_NUM_EVICTABLE]), np.int32)
        num_dropped = self._evict(pages)
        if num_dropped == 0 and self._raised and pages.size:
            raise self._raised.pop()
        return pages[:num_dropped]

    def holds(self, pages: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of `pages` are in the trees."""
        answers = np.empty(pages.shape, np.bool_)
        self._calls["holds"](np.array(pages, np.int64), answers)
        return answers

    def held_mask(self, num_pages: int) -> npt.NDArray[np.bool_]:
        """For each page 0..num_pages-1 whether it is in the trees."""
        answers = np.empty(num_pages, np.bool_)
        self._calls["held_mask"](answers)
        return answers

    def held_pages(self) -> PageArray:
        """All pages, the least first."""
        pages = np.empty(self._state[_NUM_CACHED], np.int32)
        self._calls["held_pages"](pages)
        return pages

    def nodes(self) -> Iterator[RadixNode]:
        """A snapshot of every node, roots with nodes included, parents before children, with links among themselves."""
        columns = np.empty((self._calls["num_nodes"](), len(_COLUMNS)), np.int64)
        self._calls["describe"](columns)
        rows = {row[0]: dict(zip(_COLUMNS, row, strict=True)) for row in columns.tolist()}
        made: dict[int, RadixNode] = {}
        for number in rows:
            above = []
            while number >= 0 and number not in made:
                above.append(number)
                number = rows[number]["parent"]
            for one in reversed(above):
                made[one] = self._snapshot(rows[one], made.get(rows[one]["parent"]))
        return iter(made.values())

    def defect(self) -> str:
        """What is wrong with the table of nodes or the queue, or nothing."""
        return str(self._calls["defect"]())

    def _grown(
        self, call: Any, where: tuple[Any, ...], token_ids: Any, pages: Any, only_new: bool, priority: int
    ) -> Growth:
        if type(token_ids) not in _ARRAYS:
            token_ids = as_plain_token_array("token_ids", token_ids)
        if type(pages) is not np.ndarray:
            pages = as_page_array(pages)
        try:
            num_cached = call(*where, token_ids, pages, only_new, priority)
        except _UNREADABLE:
            num_cached = -1
        if num_cached < 0:
            ids = as_plain_token_array("token_ids", token_ids)
            num_cached = call(*where, ids, np.array(as_page_array(pages), np.int64), only_new, priority)
        _, _, _, node, version, num_tokens, parent_page, root = self._state.tolist()
        handle = CacheHandle(node, version, num_tokens) if num_tokens else EMPTY_HANDLE
        return Growth(num_cached, handle, parent_page if parent_page >= 0 else None, root)

    def _snapshot(self, row: dict[str, int], parent: RadixNode | None) -> RadixNode:
        tokens, pages = np.empty(row["num_pages"] * self.page_size, np.int64), np.empty(row["num_pages"], np.int32)
        self._calls["copy_run"](row["id"], tokens, pages)
        namespace = self._namespaces.get(row["id"]) if parent is None else None
        node = RadixNode(parent, tokens, pages, self.page_size, row["created"], namespace)
        for name in ("locks", "anchors", "version", "last_access", "num_hits", "priority"):
            setattr(node, name, row[name])
        node.queued_serial = row["queued_serial"] if row["queued_serial"] >= 0 else None
        if parent is not None:
            parent.children[node.child_key] = node
        return node


def _rank(policy: EvictionPolicy, raised: list[BaseException], *run: int) -> list[float]:
    """The rank of a run; nothing, and the reason in `raised`, when the policy has no answer."""
    try:
        return [float(number) for number in policy.priority(_Run._make((*run, True)))] or [0.0]
    except BaseException as error:  # noqa: BLE001
        raised.append(error)
        return []


def _call_and_raise(call: Callable[..., Any], raised: list[BaseException], *args: Any) -> Any:
    """A call in which a policy may be asked. What is no error but an interrupt comes out, when the call is done."""
    raised.clear()
    answer = call(*args)
    for interrupt in raised:
        if not isinstance(interrupt, Exception):
            raise interrupt
    return answer


# How the binding says that it cannot take an array as it is: read-only, in foreign byte order, of another device.
_UNREADABLE = (BufferError, RuntimeError, TypeError)
