"""What came into a prefix cache and what left it, as events that a router of requests follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

from ..shapes import check_int
from .allocator import PageArray
from .page_hash import digest_pages, namespace_digest, short_hash
from .token_ids import TokenArray

if TYPE_CHECKING:
    from .prefix_cache import PrefixCache

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "CacheEvent", "EventLog", "take_events"]


@dataclass(frozen=True)
class BlockStored:
    """Pages that continue each other came into the cache.

    block_hashes:      one a page, of all tokens up to its end and the namespace (see management/page_hash.py).
    parent_block_hash: that of the page before them, None for the beginning of a prompt.
    token_ids:         those of the pages, block_size of each.
    extra_keys:        for each page what its hash depends on besides tokens: `(namespace,)`; None for namespace None.

    The other fields are those that routers expect at these places; a cache does not know them.
    """

    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: tuple[tuple[Any, ...] | None, ...] | None = None


@dataclass(frozen=True)
class BlockRemoved:
    """Pages left the cache; none that stays continues one of them."""

    block_hashes: tuple[int, ...]
    medium: str | None = None


@dataclass(frozen=True)
class AllBlocksCleared:
    """Whatever was known to be in the cache must be forgotten."""


CacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EventLog:
    """The events of one prefix cache since they were last taken, for readers who apply all of them in order.

    After each `take` a reader holds exactly what the cache holds. When the log cannot tell what happened, because more
    than `max_pending` tokens and hashes were pending or an interrupt came between the cache and the log, `take` begins
    with AllBlocksCleared and tells all that is cached then.

    cache:  who writes the log; kept by a weak reference. Without it what was forgotten cannot be told: a reader then
            holds a part of what the cache holds, complete from the beginning of each prompt, and what continues a page
            that it does not hold is not told.
    When:   the cache tells what it did by page id, after it did it; whoever publishes calls `take` after each step.
    Owns:   the digest of every page that was told, and copies of what is not yet taken, `max_pending` at most.
    Cost:   stored: a hash a page. removed: a step a page. take of all again: a hash a cached page.
    Threads: one at a time, `take` included.
    Raises: ValueError for pages that the log does not know, unless it forgot some, knows already or is told twice;
            nothing has changed then.

    >>> log = EventLog()
    >>> log.stored(None, np.array([7, 5]), np.array([1, 2, 3, 4]), namespace=None, page_size=2)
    >>> log.removed(np.array([5]))
    >>> stored, removed = log.take()
    >>> stored.token_ids, stored.block_hashes[1:] == removed.block_hashes
    ((1, 2, 3, 4), True)
    """

    def __init__(self, max_pending: int = 4_000_000, cache: PrefixCache | None = None) -> None:
        check_int("max_pending", max_pending, minimum=1)
        self._max_pending = max_pending
        self._cache = None if cache is None else ref(cache)
        self._digests: dict[int, bytes] = {}
        self._pending: list[_Stored | CacheEvent] = []
        self._num_pending = 0
        # Whether pages were forgotten that the cache may hold, and whether nothing is noted until all is told again.
        self._is_partial = self._is_behind = False

    @property
    def num_pages(self) -> int:
        """Pages told as stored and not as removed since; none between `resync` and the next `take`."""
        return len(self._digests)

    def stored(
        self, parent_page: int | None, pages: PageArray, token_ids: TokenArray, namespace: object, page_size: int
    ) -> None:
        """`pages` [n] hold `token_ids` [n * page_size] and continue `parent_page`; the log keeps copies."""
        ids = pages.tolist()
        if token_ids.shape[0] != len(ids) * page_size:
            raise ValueError(
                f"token_ids must have shape [{len(ids) * page_size}] for {len(ids)} pages of {page_size}, "
                f"got {list(token_ids.shape)}."
            )
        _check_different(ids)
        known = next((page for page in ids if page in self._digests), None)
        if known is not None:
            raise ValueError(f"pages must not be stored already, got page {known}.")
        if parent_page is not None:
            self._check_known("parent_page", [int(parent_page)])
        size = token_ids.shape[0] + len(ids)
        if not ids or not self._has_room(size):
            return
        before = namespace_digest(namespace) if parent_page is None else self._digests.get(int(parent_page))
        if before is None:
            return
        digests = digest_pages(before, token_ids, page_size)
        parent = None if parent_page is None else before
        self._num_pending += size
        self._pending.append(_Stored(parent, digests, token_ids.copy(), namespace, page_size))
        # Last, here and below: an interrupt before it is found by `check`.
        self._digests.update(zip(ids, digests, strict=True))

    def removed(self, pages: PageArray) -> None:
        """`pages` [n] left the cache."""
        ids = pages.tolist()
        _check_different(ids)
        self._check_known("pages", ids)
        if not self._has_room(len(ids)):
            return
        known = [page for page in ids if page in self._digests]
        if known:
            self._num_pending += len(known)
            self._pending.append(BlockRemoved(tuple(short_hash(self._digests[page]) for page in known)))
        for page in known:
            del self._digests[page]

    def cleared(self) -> None:
        """All pages left the cache at once. What was pending says nothing any more and is forgotten."""
        self.resync()
        self._is_partial = self._is_behind = False

    def resync(self) -> None:
        """Makes `take` begin with AllBlocksCleared and tell all that is cached then: for a reader who missed events."""
        self._is_partial, self._is_behind = True, self._cache is not None
        self._digests, self._pending, self._num_pending = {}, [AllBlocksCleared()], 0

    def check(self) -> None:
        """For the cache, before it changes: starts over when an interrupt kept the last change from being told."""
        cache = None if self._cache is None else self._cache()
        if cache is not None and not self._is_behind and cache.num_cached_pages != len(self._digests):
            self.resync()

    def take(self) -> list[CacheEvent]:
        """The events since the last call, in order."""
        self.check()
        pending, digests = list(self._pending), self._digests
        cache = None if self._cache is None else self._cache()
        if self._is_behind and cache is not None:
            pending, digests = [AllBlocksCleared()], {}
            for pages, entry in _everything_in(cache):
                digests.update(zip(pages, entry.digests, strict=True))
                pending.append(entry)
        events = [entry.event() if isinstance(entry, _Stored) else entry for entry in pending]
        self._digests, self._pending, self._num_pending = digests, [], 0
        self._is_partial = self._is_partial and self._cache is None
        self._is_behind = False
        return events

    def _check_known(self, name: str, pages: list[int]) -> None:
        page = next((page for page in pages if page not in self._digests), None)
        if page is not None and not self._is_partial:
            raise ValueError(f"{name} must be stored, got page {page}, which is not.")

    def _has_room(self, size: int) -> bool:
        """Whether so much can be noted, perhaps because all before it is forgotten."""
        if self._num_pending + size > self._max_pending:
            self.resync()
        return not self._is_behind and size <= self._max_pending


def take_events(caches: Iterable[PrefixCache]) -> list[CacheEvent]:
    """The events of several caches for one reader. When one of them starts over, which the reader cannot tell from all
    of them, all do.
    """
    logs = [cache.events for cache in caches if cache.events is not None]
    taken = [log.take() for log in logs]
    if len(logs) > 1 and any(isinstance(event, AllBlocksCleared) for events in taken for event in events):
        for log in logs:
            log.resync()
        told = [event for log in logs for event in log.take() if not isinstance(event, AllBlocksCleared)]
        return [AllBlocksCleared(), *told]
    return [event for events in taken for event in events]


@dataclass(frozen=True, eq=False)
class _Stored:
    """A BlockStored in arrays: numbers become Python objects only when somebody takes them."""

    parent: bytes | None
    digests: list[bytes]
    token_ids: TokenArray
    namespace: object
    page_size: int

    def event(self) -> BlockStored:
        return BlockStored(
            block_hashes=tuple(map(short_hash, self.digests)),
            parent_block_hash=None if self.parent is None else short_hash(self.parent),
            token_ids=tuple(self.token_ids.tolist()),
            block_size=self.page_size,
            extra_keys=None if self.namespace is None else ((self.namespace,),) * len(self.digests),
        )


def _everything_in(cache: PrefixCache) -> Iterator[tuple[list[int], _Stored]]:
    """All that is cached, each run after the one that it continues."""
    # By node: the digest of what ends with it, and the namespace.
    ends: dict[Any, tuple[bytes, object]] = {}
    for node in cache.nodes():
        if node.parent is None:
            ends[node] = namespace_digest(node.namespace), node.namespace
            continue
        before, namespace = ends[node.parent]
        digests = digest_pages(before, node.tokens, cache.page_size)
        ends[node] = digests[-1], namespace
        parent = None if node.parent.parent is None else before
        yield node.pages.tolist(), _Stored(parent, digests, node.tokens.copy(), namespace, cache.page_size)


def _check_different(pages: list[int]) -> None:
    if len(set(pages)) < len(pages):
        page, _ = Counter(pages).most_common(1)[0]
        raise ValueError(f"pages must be different, got page {page} twice.")
