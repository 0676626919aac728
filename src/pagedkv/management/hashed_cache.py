"""A prefix cache without a tree walk: every page is found by the digest of all tokens up to its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count
from sys import getsizeof
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError
from ..shapes import check_int
from .allocator import PageArray, PageIds
from .events import EventLog
from .eviction import EvictionPolicy, EvictionQueue, make_eviction_policy
from .hashed_page import HashedPage, PageRun, page_runs, token_array
from .page_hash import PageHash, digest_pages, namespace_digest, page_bytes, sha256
from .prefix_cache import EMPTY_HANDLE, CacheHandle, InsertResult, MatchResult, Namespace, namespace_key
from .radix_tree import as_page_array
from .token_ids import TokenArray, TokenIds, as_token_ids

__all__ = ["HashedPageCache"]

# Stands in the handles of a cache, which no other cache takes.
_SERIALS = count(1)


class HashedPageCache:
    """A table of whole pages by digest, each compared by tokens and by the page before it when it is found.

    Takes the place of a RadixCache, whose guarantees it has; results and errors are equal.

    page_hash: maps bytes to a digest (see management/page_hash.py); a collision costs time, never a wrong hit.
    events:    keep a log of what comes and goes in `events`.
    Units:  lookups and inserts round down to whole pages; counters count pages.
    When:   a result may be used until the next call that inserts or evicts; lock its handle to use it longer.
    Owns:   copies of token and page ids, and about 400 bytes a page besides. A page given to `insert` belongs to the
            cache until `evict` or `reset` returns it.
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
    ) -> None:
        check_int("page_size", page_size, minimum=1)
        if not callable(page_hash):
            raise TypeError(f"page_hash must be a function of bytes, got {type(page_hash).__name__}.")
        self.page_size = page_size
        self.events = EventLog() if events else None
        self._serial = next(_SERIALS)
        self._page_hash = page_hash
        self._queue: EvictionQueue[HashedPage] = EvictionQueue(make_eviction_policy(eviction))
        self._roots: dict[Any, HashedPage] = {}
        self._by_digest: dict[bytes, HashedPage] = {}
        self._by_page: dict[int, HashedPage] = {}
        # What a handle of an unknown namespace names; nothing is put behind it.
        self._void = HashedPage(None, None, b"", b"", -1, 0)
        self._time = 0
        self._num_locked_pages = 0

    @property
    def num_cached_pages(self) -> int:
        """Pages in the table."""
        return len(self._by_page)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in the table."""
        return self.num_cached_pages * self.page_size

    @property
    def num_evictable_pages(self) -> int:
        """Pages that nothing locks; `evict` can free all of them."""
        return len(self._by_page) - self._num_locked_pages

    @property
    def num_evictable_tokens(self) -> int:
        """Tokens in pages that nothing locks."""
        return self.num_evictable_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes that the pages take, the eviction queue left out; walks them."""
        tables = sum(map(getsizeof, (self._roots, self._by_digest, self._by_page)))
        return tables + sum(page.num_bytes for page in self._by_page.values())

    @property
    def eviction_policy(self) -> EvictionPolicy:
        """Who decides what goes first."""
        return self._queue.policy

    def match(self, token_ids: TokenIds, namespace: Namespace = None) -> MatchResult:
        """The longest cached prefix of `token_ids`, in whole pages; counts as a use of it."""
        ids = as_token_ids("token_ids", token_ids)
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
        """
        ids = as_token_ids("token_ids", token_ids)
        taken = self._checked_pages(ids, pages)
        key = namespace_key(namespace)
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
        return self._insert_behind(handle.node, handle.num_tokens, ids, taken, only_new, priority)

    def lock(self, handle: CacheHandle) -> None:
        """Protects the prefix that `handle` names from eviction until it is unlocked as often; none if empty."""
        self._check_current(handle)
        if handle.num_tokens == 0:
            return
        node: HashedPage = handle.node
        node.anchors += 1
        while node.parent is not None:
            node.locks += 1
            if node.locks > 1:
                break
            self._num_locked_pages += 1
            node = node.parent

    def unlock(self, handle: CacheHandle) -> None:
        """Takes back one `lock` of the same handle; counts as a use of the prefix.

        Raises: ValueError when the handle is not locked.
        """
        self._check_own(handle)
        if handle.num_tokens == 0:
            return
        node: HashedPage = handle.node
        if node.anchors < 1:
            raise ValueError(f"handle must be locked, got one of {handle.num_tokens} tokens that is not.")
        node.anchors -= 1
        while node.parent is not None:
            node.locks -= 1
            if node.locks:
                break
            self._num_locked_pages -= 1
            node = node.parent
        self._use(handle.node)

    def ancestor(self, handle: CacheHandle, num_tokens: int) -> CacheHandle:
        """The handle of the first `num_tokens` tokens (whole pages) of a current handle's prefix."""
        self._check_current(handle)
        check_int("num_tokens", num_tokens, minimum=0)
        if num_tokens % self.page_size or num_tokens > handle.num_tokens:
            raise ValueError(
                f"num_tokens must be whole pages of {self.page_size} and at most {handle.num_tokens}, got {num_tokens}."
            )
        node: HashedPage = handle.node
        for _ in range((handle.num_tokens - num_tokens) // self.page_size):
            assert node.parent is not None  # the prefix has that many pages
            node = node.parent
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
        """
        check_int("num_pages", num_pages, minimum=0)
        dropped: list[int] = []
        while len(dropped) < num_pages and (node := self._queue.pop()) is not None:
            dropped.append(node.page)
            self._drop(node)
        pages = np.array(dropped[::-1], np.int32)
        if self.events is not None:
            self.events.removed(pages)
        return pages

    def reset(self) -> PageArray:
        """Drops everything and returns the pages. Raises: ValueError while a handle is locked."""
        if self._num_locked_pages:
            raise ValueError(f"the cache must not be locked to be reset, got {self._num_locked_pages} locked pages.")
        pages = np.array(list(self._by_page), np.int32)
        for node in self._by_page.values():
            node.parent = None
        self._queue.clear()
        self._by_digest.clear()
        self._by_page.clear()
        self._roots.clear()
        if self.events is not None:
            self.events.cleared()
        return pages

    def holds(self, pages: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of `pages` are in the cache."""
        return np.array([page in self._by_page for page in pages.tolist()], np.bool_)

    def held_mask(self, num_pages: int) -> npt.NDArray[np.bool_]:
        """For each page 0..num_pages-1 whether it is in the cache."""
        mask = np.zeros(num_pages, np.bool_)
        held = np.fromiter(self._by_page, np.int64, len(self._by_page))
        mask[held[held < num_pages]] = True
        return mask

    def nodes(self) -> Iterator[PageRun]:
        """Copies of what is cached, as runs of pages and the roots above them: parents before children."""
        # A page comes into this table after the page before it, and leaves it earlier.
        yield from page_runs(self._roots.values(), self._by_page.values())

    def sanity_check(self) -> None:
        """Proves from the pages that tables and counters agree. Raises: IntegrityError. Cost: a hash a page."""
        pages = self._by_page.values()
        known = {*self._roots.values(), *pages}
        num_behind = Counter(page.parent for page in pages)
        num_locked_behind = Counter(page.parent for page in pages if page.locks)
        for root in self._roots.values():
            _require(root.num_children == num_behind[root] > 0, f"a root counts {root.num_children} prompts")
        for number, page in self._by_page.items():
            before = page.parent
            _require(before is not None and before in known, f"page {number} continues a page that is not cached")
            is_filed = page.page == number and page in self._pages_of_digest(page.digest)
            is_named = before is not None and page.digest == self._page_hash(before.digest + page.token_bytes)
            _require(is_filed and is_named, f"page {number} is filed wrongly")
            is_counted = page.num_children == num_behind[page]
            _require(is_counted, f"page {number} counts {page.num_children} pages behind it")
            is_counted = page.locks == page.anchors + num_locked_behind[page]
            _require(is_counted, f"page {number} counts {page.locks} locks, {page.anchors} of them by name")
            is_queued = page.queued_serial is not None
            _require(is_queued or not page.is_evictable, f"page {number} is evictable and not in the eviction queue")
        num_locked = sum(page.locks > 0 for page in pages)
        counted = self._num_locked_pages
        _require(counted == num_locked, f"the cache counts {counted} locked pages, {num_locked} are")

    def _pages_of_digest(self, digest: bytes) -> Iterator[HashedPage]:
        page = self._by_digest.get(digest)
        while page is not None:
            yield page
            page = page.next_equal

    def __repr__(self) -> str:
        return (
            f"HashedPageCache(page_size={self.page_size}, eviction={self.eviction_policy}, "
            f"num_cached_pages={self.num_cached_pages}, num_evictable_pages={self.num_evictable_pages})"
        )

    def _walk(self, node: HashedPage, ids: TokenArray) -> tuple[HashedPage, list[int]]:
        """Follows `ids` as far as whole pages are there: the last of them, and the ids of all."""
        pages: list[int] = []
        if not node.num_children:
            return node, pages
        page_hash, by_digest = self._page_hash, self._by_digest
        for token_bytes in page_bytes(ids, self.page_size):
            child = by_digest.get(page_hash(node.digest + token_bytes))
            while child is not None and (child.parent is not node or child.token_bytes != token_bytes):
                child = child.next_equal
            if child is None:
                break
            pages.append(child.page)
            node = child
        return node, pages

    def _insert_behind(
        self, start: HashedPage, start_tokens: int, ids: TokenArray, pages: PageArray, only_new: bool, priority: int
    ) -> InsertResult:
        check_int("priority", priority, minimum=-(2**63))
        last, found = self._walk(start, ids)
        num_cached, page_size = len(found), self.page_size
        num_known = pages.shape[0] if not (only_new and num_cached) else num_cached
        if num_known > num_cached:
            new_ids = ids[num_cached * page_size : num_known * page_size]
            last = self._add(last, new_ids, pages[num_cached:num_known], priority)
        last.priority = max(last.priority, priority)
        self._use(last)
        handle = self._handle(last, start_tokens + num_known * page_size)
        return InsertResult(num_cached * page_size, handle)

    def _add(self, last: HashedPage, ids: TokenArray, pages: PageArray, priority: int) -> HashedPage:
        """Puts `pages` behind `last`; returns the last of them."""
        page_ids: list[int] = pages.tolist()
        self._check_new(page_ids)
        digests = digest_pages(last.digest, ids, self.page_size, self._page_hash)
        if self.events is not None:
            self.events.stored(last.page if last.num_pages else None, pages, ids, last.namespace, self.page_size)
        tokens = page_bytes(ids, self.page_size)
        for page, digest, token_bytes in zip(page_ids, digests, tokens, strict=True):
            node = HashedPage(last, last.namespace, digest, token_bytes, page, self._time + 1)
            node.priority = priority
            node.next_equal = self._by_digest.get(digest)
            self._by_digest[digest] = self._by_page[page] = node
            last.num_children += 1
            last = node
        return last

    def _use(self, node: HashedPage) -> None:
        self._time += 1
        node.last_access = self._time
        self._queue.offer(node)

    def _drop(self, node: HashedPage) -> None:
        """Takes an evictable page out of the tables and hands what is known of its uses on to its parent."""
        parent = node.parent
        assert parent is not None  # roots and dropped pages are not evictable
        self._unlink(node)
        del self._by_page[node.page]
        node.parent = None
        parent.num_children -= 1
        parent.last_access = max(parent.last_access, node.last_access)
        parent.priority = max(parent.priority, node.priority)
        parent.num_hits += node.num_hits
        if parent.parent is not None:
            self._queue.offer(parent)
        elif not parent.num_children:
            del self._roots[namespace_key(parent.namespace)]

    def _unlink(self, node: HashedPage) -> None:
        """Takes `node` out of the list of its digest."""
        other = self._by_digest[node.digest]
        if other is not node:
            while other.next_equal is not node:
                assert other.next_equal is not None  # the list of its digest has the page
                other = other.next_equal
            other.next_equal = node.next_equal
        elif node.next_equal is not None:
            self._by_digest[node.digest] = node.next_equal
        else:
            del self._by_digest[node.digest]

    def _handle(self, last: HashedPage, num_tokens: int) -> CacheHandle:
        return CacheHandle(last, self._serial, num_tokens) if num_tokens else EMPTY_HANDLE

    def _check_own(self, handle: CacheHandle) -> None:
        if not isinstance(handle, CacheHandle):
            raise TypeError(f"handle must be one of this cache, got {type(handle).__name__}.")
        if handle.num_tokens and (handle.version != self._serial or not isinstance(handle.node, HashedPage)):
            raise ValueError(f"handle must be one of this cache, got one of {handle.num_tokens} tokens of another.")

    def _check_current(self, handle: CacheHandle) -> None:
        self._check_own(handle)
        if handle.num_tokens and handle.node.parent is None:
            raise ValueError(
                f"handle must name a prefix that is still cached, got one of {handle.num_tokens} tokens that changed. "
                "Lock a handle before the next insert or eviction."
            )

    def _check_new(self, pages: list[int]) -> None:
        page = next((page for page in pages if page in self._by_page), None)
        if page is not None:
            raise ValueError(
                f"pages must not be in the cache yet, got page {page}, which is there under other tokens. "
                "Commit the same token ids for pages that sequences share."
            )
        if len(set(pages)) < len(pages):
            page = next(page for number, page in enumerate(pages) if page in pages[:number])
            raise ValueError(f"pages must name each page once, got page {page} twice.")

    def _checked_pages(self, ids: TokenArray, pages: PageIds) -> PageArray:
        array = as_page_array(pages)
        if array.shape[0] != ids.shape[0] // self.page_size:
            raise ValueError(
                f"pages must have shape [{ids.shape[0] // self.page_size}] for {ids.shape[0]} tokens "
                f"(page_size {self.page_size}), got {list(array.shape)}."
            )
        if array.size and (array.min() < 0 or array.max() > 2**31 - 2):
            raise ValueError(f"pages must be in 0..2**31 - 2, got {array.min()}..{array.max()}.")
        return array.astype(np.int32, copy=False)


def _require(holds: bool, evidence: str) -> None:
    if not holds:
        raise IntegrityError(f"broken: tables and counters of the hashed cache say what its pages say: {evidence}.")
