"""The table in which a hashed cache finds the page that continues another, by its digest."""

from __future__ import annotations

from collections.abc import Iterator
from sys import getsizeof
from typing import Any, TypeVar

from .hashed_page import HashedPage
from .page_hash import PageHash, page_bytes
from .token_ids import TokenArray

__all__ = ["DigestTable"]

Page = TypeVar("Page", bound=HashedPage)


class DigestTable:
    """Pages in lists of equal digest. A digest only says where to look: tokens and the page before are compared.

    Owns: the links `next_equal` of its pages.
    """

    def __init__(self, page_size: int, page_hash: PageHash) -> None:
        self._page_size = page_size
        self.page_hash = page_hash
        self._by_digest: dict[bytes, Any] = {}

    def chain(self, before: Page, ids: TokenArray) -> list[Page]:
        """Follows the whole pages of `ids` behind `before` as far as they are here."""
        found: list[Page] = []
        if not before.num_children:
            return found
        page_hash, by_digest = self.page_hash, self._by_digest
        for token_bytes in page_bytes(ids, self._page_size):
            page = by_digest.get(page_hash(before.digest + token_bytes))
            while page is not None and (page.parent is not before or page.token_bytes != token_bytes):
                page = page.next_equal
            if page is None:
                break
            found.append(page)
            before = page
        return found

    def add(self, page: HashedPage) -> None:
        """Puts a page first in the list of its digest."""
        page.next_equal = self._by_digest.get(page.digest)
        self._by_digest[page.digest] = page

    def remove(self, page: HashedPage) -> None:
        """Takes a page out of the list of its digest."""
        other = self._by_digest[page.digest]
        if other is not page:
            while other.next_equal is not page:
                assert other.next_equal is not None  # the list of its digest has the page
                other = other.next_equal
            other.next_equal = page.next_equal
        elif page.next_equal is not None:
            self._by_digest[page.digest] = page.next_equal
        else:
            del self._by_digest[page.digest]

    def of_digest(self, digest: bytes) -> Iterator[Any]:
        """The pages of one digest."""
        page = self._by_digest.get(digest)
        while page is not None:
            yield page
            page = page.next_equal

    def pages(self) -> Iterator[Any]:
        """All pages, in no order."""
        for digest in self._by_digest:
            yield from self.of_digest(digest)

    def clear(self) -> None:
        """Forgets all pages."""
        self._by_digest.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of the table, without the pages."""
        return getsizeof(self._by_digest)
