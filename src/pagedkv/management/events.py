"""What came into a prefix cache and what left it, as events that a router of requests follows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..shapes import check_int
from .allocator import PageArray
from .page_hash import digest_pages, namespace_digest, short_hash
from .token_ids import TokenArray

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "CacheEvent", "EventLog"]


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
    """The events of one prefix cache since they were last taken.

    When:   the cache tells what it did by page id, after it did it; whoever publishes calls `take` after each step.
    Owns:   the digest of every page that the cache holds, and copies of what is not yet taken: at most `max_pending`
            tokens and hashes. When they would be more, they are forgotten for one AllBlocksCleared: a reader then
            believes less to be cached than is, and never more.
    Cost:   stored: a hash a page. removed: a step a page.
    Threads: one at a time, `take` included.
    Raises: ValueError for pages that the log does not know, knows already or is told twice; nothing has changed then.

    >>> log = EventLog()
    >>> log.stored(None, np.array([7, 5]), np.array([1, 2, 3, 4]), namespace=None, page_size=2)
    >>> log.removed(np.array([5]))
    >>> stored, removed = log.take()
    >>> stored.token_ids, stored.block_hashes[1:] == removed.block_hashes
    ((1, 2, 3, 4), True)
    """

    def __init__(self, max_pending: int = 4_000_000) -> None:
        check_int("max_pending", max_pending, minimum=1)
        self._max_pending = max_pending
        self._digests: dict[int, bytes] = {}
        self._pending: list[_Stored | CacheEvent] = []
        self._num_pending = 0

    @property
    def num_pages(self) -> int:
        """Pages stored and not removed since."""
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
        before = namespace_digest(namespace) if parent_page is None else self._known("parent_page", int(parent_page))
        if not ids:
            return
        digests = digest_pages(before, token_ids, page_size)
        self._digests.update(zip(ids, digests, strict=True))
        parent = None if parent_page is None else before
        self._keep(_Stored(parent, digests, token_ids.copy(), namespace, page_size), token_ids.shape[0] + len(ids))

    def removed(self, pages: PageArray) -> None:
        """`pages` [n] left the cache."""
        ids = pages.tolist()
        _check_different(ids)
        hashes = tuple(short_hash(self._known("pages", page)) for page in ids)
        if not ids:
            return
        for page in ids:
            del self._digests[page]
        self._keep(BlockRemoved(hashes), len(ids))

    def cleared(self) -> None:
        """All pages left the cache at once. What was pending says nothing any more and is forgotten."""
        self._digests.clear()
        self._forget_pending()

    def take(self) -> list[CacheEvent]:
        """The events since the last call, in order."""
        pending, self._pending, self._num_pending = self._pending, [], 0
        return [entry.event() if isinstance(entry, _Stored) else entry for entry in pending]

    def _known(self, name: str, page: int) -> bytes:
        digest = self._digests.get(page)
        if digest is None:
            raise ValueError(f"{name} must be stored, got page {page}, which is not.")
        return digest

    def _keep(self, entry: _Stored | CacheEvent, size: int) -> None:
        if self._num_pending + size > self._max_pending:
            self._forget_pending()
        if self._num_pending + size <= self._max_pending:
            self._pending.append(entry)
            self._num_pending += size

    def _forget_pending(self) -> None:
        self._pending, self._num_pending = [AllBlocksCleared()], 0


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


def _check_different(pages: list[int]) -> None:
    if len(set(pages)) < len(pages):
        page, _ = Counter(pages).most_common(1)[0]
        raise ValueError(f"pages must be different, got page {page} twice.")
