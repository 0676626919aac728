"""Events of a cache that keeps the end of a prompt without its beginning."""

from __future__ import annotations

from .allocator import PageArray
from .events import EventLog
from .hashed_page import WindowPage, token_array
from .page_hash import PageHash, digest_pages, namespace_digest, sha256
from .token_ids import TokenArray

__all__ = ["WindowEventLog"]

# Stands for the page before a run while the run is told; no page has this number.
_BEFORE = -1


class WindowEventLog(EventLog):
    """An EventLog that is told a run by the position before it, whose page may have left the cache.

    A BlockRemoved of it may name pages that others in the cache continue.

    page_hash: what the digests of the cache are made with; another than that of events costs a hash for each page
               before a run whose beginning has left the cache.
    """

    def __init__(self, page_hash: PageHash) -> None:
        super().__init__()
        self._has_digests = page_hash is sha256

    def stored_at(self, first: WindowPage, pages: PageArray, token_ids: TokenArray, page_size: int) -> None:
        """`pages` [n] hold `token_ids` [n * page_size] from the position `first` on."""
        before = first.parent
        assert before is not None  # a root is no position
        if before.parent is None or before.page >= 0:
            parent = None if before.parent is None else before.page
            self.stored(parent, pages, token_ids, before.namespace, page_size)
            return
        self._digests[_BEFORE] = before.digest if self._has_digests else _digest_of(before, page_size)
        try:
            self.stored(_BEFORE, pages, token_ids, before.namespace, page_size)
        finally:
            self._digests.pop(_BEFORE, None)


def _digest_of(last: WindowPage, page_size: int) -> bytes:
    """The digest of a position in events, made from its tokens."""
    parts: list[bytes] = []
    page = last
    while page.parent is not None:
        parts.append(page.token_bytes)
        page = page.parent
    return digest_pages(namespace_digest(last.namespace), token_array(b"".join(reversed(parts))), page_size)[-1]
