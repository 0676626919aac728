"""A prefix cache without a tree walk: every page is found by the digest of all tokens up to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..shapes import check_int
from .allocator import PageArray, PageIds
from .events import EventLog
from .eviction import EvictionPolicy, make_eviction_policy
from .hashed_books import SERIALS
from .hashed_events import WindowEventLog
from .hashed_page import HashedPage, token_array
from .hashed_runs import PageRun, page_runs, window_runs
from .hashed_sanity import check_prefix_pages, check_window_pages
from .hashed_window import WindowBooks
from .page_hash import PageHash, namespace_digest, sha256
from .prefix_cache import CacheHandle, InsertResult, MatchResult, Namespace, namespace_key
from .radix_tree import check_priority
from .token_ids import TokenArray, TokenIds, as_token_ids

__all__ = ["HashedPageCache"]


class HashedPageCache(WindowBooks):
    """A table of whole pages by digest, each compared by tokens and by the page before it when it is found.

    Takes the place of a RadixCache, whose guarantees it has; results and errors are equal.

    page_hash: maps bytes to a digest (see management/page_hash.py); a collision costs time, never a wrong hit.
    events:    keep a log of what comes and goes in `events`.
    window:    how many tokens each token sees, itself included, as in the sliding layers of a hybrid model; None for
               all. A prefix needs only the pages of its last `window` - 1 tokens then: a match finds it by these and
               names -1 before them, a lock protects these alone, and any other page can be evicted, whatever continues
               it. See management/hashed_window.py.
    Units:  lookups and inserts round down to whole pages; counters count pages.
    When:   a result may be used until the next call that inserts or evicts; lock its handle to use it longer.
    Owns:   copies of token and page ids, and about 400 bytes a page besides. A page given to `insert` belongs to the
            cache until `evict` or `reset` returns it. With a window, tokens of pages that left are kept as long as a
            cached page continues them.
    Cost:   match and insert: a hash and a comparison for each page of the prompt up to the first that is not there.
            lock and unlock: a step for each page that becomes locked or free. evict: a heap operation a page.
    Raises: ValueError, TypeError for misuse; nothing has changed then.

    >>> cache = HashedPageCache(page_size=2)
    >>> cache.insert([1, 2, 3, 4], [7, 5]).num_cached
    0
    >>> cache.match([1, 2, 3, 9])[:2]
    (2, array([7], dtype=int32))
    >>> cache.evict(1)
    array([5], dtype=int32)
    """

    def __init__(
        self,
        page_size: int,
        eviction: str | EvictionPolicy = "lru",
        *,
        page_hash: PageHash = sha256,
        events: bool = False,
        window: int | None = None,
    ) -> None:
        if window is not None:
            check_int("window", window, minimum=1)
        self._policy = make_eviction_policy(eviction)
        super().__init__(page_size, self._policy, page_hash, window)
        if events:
            self.events = EventLog(cache=self) if window is None else WindowEventLog(page_hash)

    @property
    def window(self) -> int | None:
        """How many tokens each token sees, itself included; None for all."""
        return self._window

    @property
    def eviction_policy(self) -> EvictionPolicy:
        """Who decides what goes first."""
        return self._policy

    def match(self, token_ids: TokenIds, namespace: Namespace = None) -> MatchResult:
        """The longest cached prefix of `token_ids`, in whole pages; counts as a use of it.

        With a window: the longest whose needed pages are cached; `pages` has -1 before these, which alone are used.
        """
        ids = as_token_ids("token_ids", token_ids)
        if self._window is not None:
            return self._match_in_window(ids, namespace)
        last, pages = self._walk(self._roots.get(namespace_key(namespace), self._void), ids)
        last.num_hits += 1
        self._use(last)
        num_tokens = len(pages) * self.page_size
        return MatchResult(num_tokens, np.array(pages, np.int32), self._handle(last, num_tokens))

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

        only_new: adds nothing at all when the beginning is there already; `num_cached` tells.
        priority: what the policy "priority" looks at; the prefix has at least this one from now on.

        Shapes: token_ids [n]; pages [n // page_size]. The pages of the first `num_cached` tokens of the result are not
                taken, they stay the caller's; the others are the cache's from now on.
        Raises: ValueError when a page to be taken is negative, named twice or in the cache already.

        With a window the first pages may be -1: these positions get none, and `only_new` looks at the first that is
        given. Of the others those are taken that follow the first `num_cached` tokens and any -1, up to the next
        position that has a page, unless the prefix up to there would lack a page that it needs. `handle` names the
        prefix up to the end of what was taken, or the first `num_cached` tokens when nothing was.
        """
        ids = as_token_ids("token_ids", token_ids)
        taken = self._checked_pages(ids, pages)
        key = namespace_key(namespace)
        check_priority(priority)
        self._check_events()
        if self._window is not None:
            root = self._roots.get(key) or self._new_root(namespace)
            result = self._insert_in_window(root, ids, taken, only_new, priority)
        else:
            root = self._roots.get(key)
            if root is None:
                root = HashedPage(None, namespace, namespace_digest(namespace, self._page_hash), b"", -1, self._time)
            result = self._insert_behind(root, 0, ids, taken, only_new, priority)
        if root.num_children:
            self._roots[key] = root
        return result

    def extend(
        self, handle: CacheHandle, token_ids: TokenIds, pages: PageIds, *, only_new: bool = False, priority: int = 0
    ) -> InsertResult:
        """The same as inserting what `handle` names followed by `token_ids`; counts in `num_cached` are of these."""
        self._check_current(handle)
        ids = as_token_ids("token_ids", token_ids)
        taken = self._checked_pages(ids, pages)
        if handle.num_tokens == 0:
            raise ValueError("handle must name a cached prefix to be extended, got an empty one. Insert instead.")
        check_priority(priority)
        self._check_events()
        if self._window is not None:
            return self._extend_in_window(handle, ids, taken, only_new, priority)
        return self._insert_behind(handle.node, handle.num_tokens, ids, taken, only_new, priority)

    def lock(self, handle: CacheHandle) -> None:
        """Protects the prefix that `handle` names from eviction until it is unlocked as often; none if empty.

        With a window: the pages that it needs.
        """
        self._check_current(handle)
        if handle.num_tokens == 0:
            return
        if self._window is None:
            self._lock(handle.node)
        else:
            self._lock_in_window(handle.node)

    def unlock(self, handle: CacheHandle) -> None:
        """Takes back one `lock` of the same handle; counts as a use of the prefix.

        Raises: ValueError when the handle is not locked.
        """
        self._check_own(handle)
        if handle.num_tokens == 0:
            return
        if handle.node.anchors < 1:
            raise ValueError(f"handle must be locked, got one of {handle.num_tokens} tokens that is not.")
        if self._window is None:
            self._unlock(handle.node)
            self._use(handle.node)
        else:
            self._unlock_in_window(handle.node)

    def ancestor(self, handle: CacheHandle, num_tokens: int) -> CacheHandle:
        """The handle of the first `num_tokens` tokens (whole pages) of a current handle's prefix.

        Raises: ValueError, with a window, when a page that these need has left since.
        """
        self._check_current(handle)
        check_int("num_tokens", num_tokens, minimum=0)
        if num_tokens % self.page_size or num_tokens > handle.num_tokens:
            raise ValueError(
                f"num_tokens must be whole pages of {self.page_size} and at most {handle.num_tokens}, got {num_tokens}."
            )
        node: Any = handle.node
        for _ in range((handle.num_tokens - num_tokens) // self.page_size):
            node = node.parent
        if self._window is not None and num_tokens:
            return self._ancestor_in_window(handle, node)
        return self._handle(node, num_tokens)

    def locked_tokens(self, handle: CacheHandle, start: int) -> TokenArray:
        """Token ids [start, handle.num_tokens) of the prefix that a locked or current handle names."""
        self._check_current(handle)
        check_int("start", start, minimum=0)
        parts: list[bytes] = []
        node, end = handle.node, handle.num_tokens
        while end > start:
            parts.append(node.token_bytes)
            end -= self.page_size
            node = node.parent
        return token_array(b"".join(reversed(parts)))[max(0, start - end) :]

    def evict(self, num_pages: int) -> PageArray:
        """Drops up to `num_pages` pages that nothing locks and returns them: fewer when there are no more.

        Order: by the eviction policy; of each run the last pages first, so that what is left is still a prefix. The
               result begins with what was dropped last, so that runs come out in the order of their tokens.
               With a window by the policy alone, each page by its own uses; of equals the last.
        """
        check_int("num_pages", num_pages, minimum=0)
        self._check_events()
        drop: Callable[[Any], None] = self._drop
        if self._window is not None:
            self._offer_now()
            drop = self._leave
        dropped: list[int] = []
        while len(dropped) < num_pages:
            try:
                node = self._queue.pop()
            except Exception:  # of a user's policy: what has left is the caller's
                if not dropped:
                    raise
                break
            if node is None:
                break
            dropped.append(node.page)
            drop(node)
        pages = np.array(dropped[::-1], np.int32)
        if self.events is not None:
            self.events.removed(pages)
        return pages

    def reset(self, force: bool = False) -> PageArray:
        """Drops everything and returns the pages; all handles are stale then.

        force: with it locks too, whatever state an interrupt left the cache in.
        Raises: ValueError while a handle is locked, unless forced.
        """
        if force:
            self._num_locked_pages = 0
            self._serial = next(SERIALS)
        elif self._num_locked_pages:
            raise ValueError(f"the cache must not be locked to be reset, got {self._num_locked_pages} locked pages.")
        pages = np.array(list(self._by_page), np.int32)
        self._forget_all()
        self._queue.clear()
        self._table.clear()
        self._by_page.clear()
        self._roots.clear()
        if self.events is not None:
            self.events.cleared()
        return pages

    def nodes(self) -> Iterator[PageRun]:
        """Copies of what is cached, as runs of pages and the roots above them: parents before children."""
        if self._window is not None:
            yield from window_runs(self._roots.values(), self._table.pages(), self._window_pages)
        else:
            # A page comes into this table after the page before it, and leaves it earlier.
            yield from page_runs(self._roots.values(), self._by_page.values())

    def sanity_check(self) -> None:
        """Proves from the pages that tables and counters agree. Raises: IntegrityError. Cost: a hash a page."""
        roots, num_locked = list(self._roots.values()), self._num_locked_pages
        if self._window is None:
            check_prefix_pages(roots, self._table, self._by_page, num_locked)
        else:
            check_window_pages(roots, self._table, self._by_page, num_locked, self._window_pages, self._to_offer)

    def _check_events(self) -> None:
        if self.events is not None:
            self.events.check()

    def __repr__(self) -> str:
        window = "" if self._window is None else f", window={self._window}"
        return (
            f"HashedPageCache(page_size={self.page_size}, eviction={self.eviction_policy}{window}, "
            f"num_cached_pages={self.num_cached_pages}, num_evictable_pages={self.num_evictable_pages})"
        )
