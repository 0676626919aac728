"""The prefix cache's index: which pages hold the keys and values of which runs of tokens."""

from __future__ import annotations

from collections.abc import Iterator
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
from .radix_tree import Growth, RadixTree, check_priority, drop_empty_roots, names_pages, new_first_version
from .token_ids import TokenArray, TokenIds, as_token_ids

__all__ = ["CacheHandle", "InsertResult", "MatchResult", "Namespace", "RadixCache", "namespace_key"]

_CORES = ("auto", "native", "python")


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
    Raises:  ValueError, TypeError for misuse; nothing has changed then. After an interrupt (KeyboardInterrupt) the call
             has happened or not, and its answer is lost; one inside the Python core may need `reset(force=True)`.

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
        self.events = EventLog(cache=self) if events else None
        policy, version = make_eviction_policy(eviction), new_first_version()
        self._first_versions = {version}
        self._tree_type = _tree_type(core)
        self._tree: RadixTree = self._tree_type(page_size, policy, version)

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
        return "native" if self._tree_type is NativeRadixTree else "python"

    def match(self, token_ids: TokenIds, namespace: Namespace = None) -> MatchResult:
        """The longest cached prefix of `token_ids`, in whole pages; counts as a use of it."""
        return self._tree.match(self._tree.roots.get(namespace_key(namespace)), token_ids)

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
        priority: an int of 64 bits, for the policy "priority"; what is there already has the highest it was ever given.

        Shapes: token_ids [n]; pages [n // page_size]. The pages of the first `num_cached` tokens of the result are not
                taken, they stay the caller's; the others are the cache's from now on.
        Raises: ValueError when a page to be taken is negative, named twice or in the cache already.
        """
        check_priority(priority)
        if self.events is not None:
            self.events.check()
        tree, key = self._tree, namespace_key(namespace)
        root = tree.roots.get(key)
        if root is None:
            root = tree.roots[key] = tree.add_root(namespace)
        try:
            growth = tree.insert(root, token_ids, pages, only_new, priority)
        finally:
            drop_empty_roots(tree)
        if self.events is not None:
            self._log_stored(self.events, growth, 0, token_ids, pages)
        return InsertResult(growth.num_cached, growth.handle)

    def extend(
        self, handle: CacheHandle, token_ids: TokenIds, pages: PageIds, *, only_new: bool = False, priority: int = 0
    ) -> InsertResult:
        """The same as inserting what `handle` names followed by `token_ids`, from there on.

        Counts in `num_cached` are those of `token_ids`. A leaf that is locked once grows in place: the lock then covers
        the new pages too, and a sequence that is decoded page by page stays one node. Handles mean what they meant.
        """
        check_priority(priority)
        if not names_pages(handle, self._tree, self._first_versions):
            raise ValueError("handle must name a cached prefix to be extended, got an empty one. Insert instead.")
        if self.events is not None:
            self.events.check()
        growth = self._tree.extend(handle, token_ids, pages, only_new, priority)
        if self.events is not None:
            self._log_stored(self.events, growth, handle.num_tokens, token_ids, pages)
        return InsertResult(growth.num_cached, growth.handle)

    def extend_leaves(
        self,
        handles: list[CacheHandle],
        tokens: npt.NDArray[Any],
        token_starts: npt.NDArray[np.int64],
        pages: PageArray,
        page_starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        priorities: list[int],
    ) -> npt.NDArray[np.bool_]:
        """What `extend(only_new=True)` does for each of n locked handles, where the run that ends there only grows:
        returns for which it did, [n]. For the others nothing was done; a step of decoding extends those alone.

        Shapes: tokens, pages: rows of all of them, int32 or int64 and int32, of which the i-th one's next tokens begin
                at token_starts[i], their pages at page_starts[i], counts[i] pages. Nothing is checked but bounds.
        """
        tree = self._tree
        if self.events is not None or not isinstance(tree, NativeRadixTree):
            return np.zeros(len(handles), np.bool_)
        given = np.array(handles, np.int64), np.array(priorities, np.int64)
        return tree.extend_leaves(given[0], tokens, token_starts, pages, page_starts, counts, given[1])

    def lock(self, handle: CacheHandle) -> None:
        """Protects the prefix that `handle` names from eviction until it is unlocked as often; none if empty."""
        if names_pages(handle, self._tree, self._first_versions):
            self._tree.lock(handle)

    def unlock(self, handle: CacheHandle) -> None:
        """Takes back one `lock` of the same handle; counts as a use of the prefix.

        Raises: ValueError when the handle is not locked.
        """
        if names_pages(handle, self._tree, self._first_versions):
            self._tree.unlock(handle)

    def ancestor(self, handle: CacheHandle, num_tokens: int) -> CacheHandle:
        """The handle of the first `num_tokens` tokens (whole pages) of a current handle's prefix."""
        is_empty = not names_pages(handle, self._tree, self._first_versions) or num_tokens == 0
        check_int("num_tokens", num_tokens, minimum=0)
        if num_tokens % self.page_size or num_tokens > handle.num_tokens:
            raise ValueError(
                f"num_tokens must be whole pages of {self.page_size} and at most {handle.num_tokens}, got {num_tokens}."
            )
        return EMPTY_HANDLE if is_empty else self._tree.ancestor(handle, num_tokens)

    def locked_tokens(self, handle: CacheHandle, start: int) -> TokenArray:
        """Token ids [start, handle.num_tokens) of the prefix that a current handle names."""
        check_int("start", start, minimum=0)
        if not names_pages(handle, self._tree, self._first_versions):
            return np.empty(0, np.int64)
        return self._tree.locked_tokens(handle, start)

    def evict(self, num_pages: int) -> PageArray:
        """Drops up to `num_pages` pages that nothing locks and returns them: fewer when there are no more.

        Order: by the eviction policy; of each run the last pages first, so that what is left is still a prefix, and
                what a prompt was answered goes before the prompt.
        """
        check_int("num_pages", num_pages, minimum=0)
        if self.events is not None:
            self.events.check()
        pages = self._tree.evict(num_pages)
        drop_empty_roots(self._tree)
        if self.events is not None and pages.size:
            self.events.removed(pages)
        return pages

    def reset(self, force: bool = False) -> PageArray:
        """Drops everything and returns the pages; all handles are stale then.

        force: with it locks too, whatever state an interrupt left the cache in.
        Raises: ValueError while a handle is locked, unless forced.
        """
        num_locked = self.num_cached_pages - self.num_evictable_pages
        if num_locked and not force:
            raise ValueError(f"the cache must not be locked to be reset, got {num_locked} locked pages.")
        version, pages = new_first_version(), self._tree.held_pages()
        self._first_versions.add(version)
        self._tree = self._tree_type(self.page_size, self.eviction_policy, version)
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
        """Every node, roots with nodes included, parents before children: for inspection, not for change.

        The nodes of one call name each other; those of the native core are copies, made for this call.
        """
        return self._tree.nodes()

    def sanity_check(self) -> None:
        """Walks the tree and proves that it agrees with itself; see management/radix_sanity.py.

        Raises: IntegrityError that quotes the sentence that does not hold.
        """
        check_radix_tree(self._tree, self.page_size)

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


def _tree_type(core: str) -> type[NativeRadixTree] | type[PythonRadixTree]:
    if core not in _CORES:
        raise ValueError(f"core must be {', '.join(map(repr, _CORES))}, got {core!r}.")
    reason = native.unavailable() if core != "python" else None
    if core == "native" and reason is not None:
        raise BackendUnavailableError(f"core 'native' cannot load: {reason}.")
    return PythonRadixTree if core == "python" or reason is not None else NativeRadixTree
