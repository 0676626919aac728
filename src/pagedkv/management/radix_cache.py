"""The prefix cache's index: which pages hold the keys and values of which runs of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendUnavailableError
from ..kernels.cpu import native
from ..shapes import check_int
from .allocator import PageArray, PageIds
from .events import EventLog
from .eviction import EvictionPolicy, make_eviction_policy
from .native_radix_tree import NativeRadixTree
from .prefix_cache import EMPTY_HANDLE, CacheHandle, InsertResult, MatchResult, Namespace, namespace_key
from .python_radix_tree import PythonRadixTree
from .radix_node import RadixNode
from .radix_sanity import check_radix_tree
from .radix_tree import Growth, RadixTree
from .token_ids import TokenArray, TokenIds, as_token_ids

__all__ = ["CacheHandle", "InsertResult", "MatchResult", "Namespace", "RadixCache", "namespace_key"]

_CORES = ("auto", "native", "python")

# The upper half of the versions in the handles of a cache, so that no other cache takes them.
_SERIALS = count(1)
_SERIAL_BITS = 32


class RadixCache:
    """A radix tree over whole pages, one root a namespace.

    eviction: which pages go first, a name or a policy (see management/eviction.py).
    events:  keep a log of what comes and goes in `events`; costs a hash a page.
    core:    "native", "python", or "auto" for the first of these that runs here. They give equal results.
    Units:   lookups and inserts round down to whole pages.
    When:    a result may be used until the next call that inserts or evicts; lock its handle to use it longer.
    Owns:    copies of token and page ids. Whether a page is free is the allocator's business: a page given to `insert`
             belongs to the cache until `evict` or `reset` returns it.
    Cost:    match and insert: the tokens compared, and a step a node. lock and unlock: a step a node. evict: a heap
             operation for each run that loses pages, never a walk of the tree.
    Threads: one at a time.
    Raises:  ValueError, TypeError for misuse; nothing has changed then.

    >>> cache = RadixCache(page_size=2)
    >>> cache.insert([1, 2, 3, 4], [7, 5]).num_cached
    0
    >>> cache.match([1, 2, 3, 9])[:2]
    (2, array([7], dtype=int32))
    >>> cache.evict(1)
    array([5], dtype=int32)
    """

    def __init__(
        self, page_size: int, eviction: str | EvictionPolicy = "lru", *, events: bool = False, core: str = "auto"
    ) -> None:
        check_int("page_size", page_size, minimum=1)
        self.page_size = page_size
        self.events = EventLog() if events else None
        self._serial = next(_SERIALS)
        self._tree = _make_tree(core, page_size, make_eviction_policy(eviction), self._serial << _SERIAL_BITS)
        self._roots: dict[Any, Any] = {}

    @property
    def num_cached_pages(self) -> int:
        """Pages in the tree."""
        return self._tree.num_cached_pages

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in the tree."""
        return self._tree.num_cached_pages * self.page_size

    @property
    def num_evictable_pages(self) -> int:
        """Pages in nodes that nothing locks; `evict` can free all of them."""
        return self._tree.num_evictable_pages

    @property
    def num_evictable_tokens(self) -> int:
        """Tokens in nodes that nothing locks."""
        return self._tree.num_evictable_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes that the tree takes; walks it."""
        return self._tree.num_bytes

    @property
    def eviction_policy(self) -> EvictionPolicy:
        """Who decides what goes first."""
        return self._tree.policy

    @property
    def core(self) -> str:
        """What runs: "native" or "python"."""
        return "native" if isinstance(self._tree, NativeRadixTree) else "python"

    def match(self, token_ids: TokenIds, namespace: Namespace = None) -> MatchResult:
        """The longest cached prefix of `token_ids`, in whole pages; counts as a use of it."""
        return self._tree.match(self._roots.get(namespace_key(namespace)), token_ids)

    def insert(
        self,
        token_ids: TokenIds,
        pages: PageIds,
        namespace: Namespace = None,
        *,
        only_new: bool = False,
        priority: int = 0,
    ) -> InsertResult:
        """Adds the prefix `token_ids`, whose keys and values are in `pages`; what is there already stays as it is.

        only_new: adds nothing at all when the beginning is there already, so that the result never stands on pages of
                others; `num_cached` tells.
        priority: for the policy "priority"; what is there already has the highest it was ever given.

        Shapes: token_ids [n]; pages [n // page_size]. The pages of the first `num_cached` tokens of the result are not
                taken, they stay the caller's; the others are the cache's from now on.
        Raises: ValueError when a page to be taken is negative, named twice or in the cache already.
        """
        _check_priority(priority)
        key = namespace_key(namespace)
        known = self._roots.get(key)
        root = self._tree.add_root(namespace) if known is None else known
        growth = None
        try:
            growth = self._tree.insert(root, token_ids, pages, only_new, priority)
        finally:
            if known is None and growth is not None and growth.handle.num_tokens:
                self._roots[key] = root
            elif known is None:
                self._tree.drop_root(root)
        if self.events is not None:
            self._log_stored(self.events, growth, 0, token_ids, pages)
        return InsertResult(growth.num_cached, growth.handle)

    def extend(
        self, handle: CacheHandle, token_ids: TokenIds, pages: PageIds, *, only_new: bool = False, priority: int = 0
    ) -> InsertResult:
        """The same as inserting what `handle` names followed by `token_ids`, from there on.

        Counts in `num_cached` are those of `token_ids`. A leaf that only `handle` locks grows in place: the handle's
        lock then covers the new pages too, and a sequence that is decoded page by page stays one node.
        """
        _check_priority(priority)
        if not self._names_pages(handle):
            raise ValueError("handle must name a cached prefix to be extended, got an empty one. Insert instead.")
        growth = self._tree.extend(handle, token_ids, pages, only_new, priority)
        if self.events is not None:
            self._log_stored(self.events, growth, handle.num_tokens, token_ids, pages)
        return InsertResult(growth.num_cached, growth.handle)

    def lock(self, handle: CacheHandle) -> None:
        """Protects the prefix that `handle` names from eviction until it is unlocked as often; none if empty."""
        if self._names_pages(handle):
            self._tree.lock(handle)

    def unlock(self, handle: CacheHandle) -> None:
        """Takes back one `lock` of the same handle; counts as a use of the prefix.

        Raises: ValueError when the handle is not locked.
        """
        if self._names_pages(handle):
            self._tree.unlock(handle)

    def ancestor(self, handle: CacheHandle, num_tokens: int) -> CacheHandle:
        """The handle of the first `num_tokens` tokens (whole pages) of a current handle's prefix."""
        is_empty = not self._names_pages(handle) or num_tokens == 0
        check_int("num_tokens", num_tokens, minimum=0)
        if num_tokens % self.page_size or num_tokens > handle.num_tokens:
            raise ValueError(
                f"num_tokens must be whole pages of {self.page_size} and at most {handle.num_tokens}, got {num_tokens}."
            )
        return EMPTY_HANDLE if is_empty else self._tree.ancestor(handle, num_tokens)

    def locked_tokens(self, handle: CacheHandle, start: int) -> TokenArray:
        """Token ids [start, handle.num_tokens) of the prefix that a current handle names."""
        check_int("start", start, minimum=0)
        if not self._names_pages(handle):
            return np.empty(0, np.int64)
        return self._tree.locked_tokens(handle, start)

    def evict(self, num_pages: int) -> PageArray:
        """Drops up to `num_pages` pages that nothing locks and returns them: fewer when there are no more.

        Order: by the eviction policy; of each run the last pages first, so that what is left is still a prefix, and
                what a prompt was answered goes before the prompt.
        """
        check_int("num_pages", num_pages, minimum=0)
        pages = self._tree.evict(num_pages)
        self._forget_empty_roots()
        if self.events is not None and pages.size:
            self.events.removed(pages)
        return pages

    def reset(self) -> PageArray:
        """Drops everything and returns the pages. Raises: ValueError while a handle is locked."""
        num_locked = self.num_cached_pages - self.num_evictable_pages
        if num_locked:
            raise ValueError(f"the cache must not be locked to be reset, got {num_locked} locked pages.")
        pages = self._tree.evict(self.num_cached_pages)
        self._forget_empty_roots()
        if self.events is not None:
            self.events.cleared()
        return pages

    def holds(self, pages: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of `pages` are in the tree."""
        return self._tree.holds(pages)

    def held_mask(self, num_pages: int) -> npt.NDArray[np.bool_]:
        """For each page 0..num_pages-1 whether it is in the tree."""
        return self._tree.held_mask(num_pages)

    def nodes(self) -> Iterator[RadixNode]:
        """Every node, roots included, parents before children: for inspection, not for change.

        The nodes of one call name each other; those of the native core are copies, made for this call.
        """
        return self._tree.nodes()

    def sanity_check(self) -> None:
        """Walks the tree and proves that it agrees with itself; see management/radix_sanity.py.

        Raises: IntegrityError that quotes the sentence that does not hold.
        """
        check_radix_tree(self._tree, self.page_size)

    def _names_pages(self, handle: CacheHandle) -> bool:
        """False for an empty handle, which all caches take; refuses one of another cache."""
        if not isinstance(handle, CacheHandle):
            raise TypeError(f"handle must be what match, insert or extend gave, got {type(handle).__name__}.")
        if handle.num_tokens and handle.version >> _SERIAL_BITS != self._serial:
            raise ValueError(f"handle must be one of this cache, got another's of {handle.num_tokens} tokens.")
        return handle.num_tokens > 0

    def _forget_empty_roots(self) -> None:
        for namespace in self._tree.pop_empty_namespaces():
            del self._roots[namespace_key(namespace)]

    def _log_stored(
        self, events: EventLog, growth: Growth, num_before: int, token_ids: TokenIds, pages: PageIds
    ) -> None:
        first = growth.num_cached // self.page_size
        stop = (growth.handle.num_tokens - num_before) // self.page_size
        if stop > first:
            ids = as_token_ids("token_ids", token_ids)[first * self.page_size : stop * self.page_size]
            new_pages = np.asarray(pages, np.int32)[first:stop]
            namespace = self._tree.namespace_of(growth.root)
            events.stored(growth.parent_page, new_pages, ids, namespace, self.page_size)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a RadixCache must not be copied or pickled: its pages belong to one pool. Make a new one.")

    def __repr__(self) -> str:
        return (
            f"RadixCache(page_size={self.page_size}, eviction={self.eviction_policy}, core={self.core!r}, "
            f"num_cached_pages={self.num_cached_pages}, num_evictable_pages={self.num_evictable_pages})"
        )


def _check_priority(priority: int) -> None:
    if type(priority) is int and -(2**31) <= priority < 2**31:
        return
    check_int("priority", priority, minimum=-(2**31))
    raise ValueError(f"priority must be below 2**31, got {priority}.")


def _make_tree(core: str, page_size: int, policy: EvictionPolicy, first_version: int) -> RadixTree:
    if core not in _CORES:
        raise ValueError(f"core must be {', '.join(map(repr, _CORES))}, got {core!r}.")
    reason = native.unavailable() if core != "python" else None
    if core == "native" and reason is not None:
        raise BackendUnavailableError(f"core 'native' cannot load: {reason}.")
    if core == "python" or reason is not None:
        return PythonRadixTree(page_size, policy, first_version)
    return NativeRadixTree(page_size, policy, first_version)
