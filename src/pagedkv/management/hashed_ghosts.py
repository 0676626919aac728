"""Chains of positions in a hashed cache with a window, and how ghosts come and go."""

from __future__ import annotations

from .hashed_books import HashedBooks
from .hashed_page import WindowPage, token_array
from .page_hash import namespace_digest, page_bytes
from .prefix_cache import Namespace, namespace_key
from .token_ids import TokenArray

__all__ = ["GhostBooks"]


class GhostBooks(HashedBooks):
    """What is known of a prompt stays from its beginning to its last cached page, and no longer."""

    def _new_root(self, namespace: Namespace) -> WindowPage:
        root = WindowPage(None, namespace, namespace_digest(namespace, self._page_hash), b"", -1, self._time)
        root.position, root.span = -1, None
        return root

    def _ghosts(self, before: WindowPage, ids: TokenArray, *, are_filed: bool = True) -> list[WindowPage]:
        """A new chain for the whole pages of `ids` behind `before`; not filed, the table does not know it."""
        chain = []
        namespace, position, page_hash, add = before.namespace, before.position, self._page_hash, self._table.add
        for token_bytes in page_bytes(ids, self.page_size):
            position += 1
            page = WindowPage(before, namespace, page_hash(before.digest + token_bytes), token_bytes, -1, self._time)
            page.position, page.span = position, None
            if are_filed:
                before.num_children += 1
                add(page)
            chain.append(page)
            before = page
        return chain

    def _filed(self, page: WindowPage) -> WindowPage:
        """The position in the table for one of a handle's own chain; it must be forgotten or continued."""
        path: list[WindowPage] = []
        while page.parent is not None:
            path.append(page)
            page = page.parent
        key = namespace_key(page.namespace)
        last: WindowPage = self._roots.get(key) or self._new_root(page.namespace)
        self._roots[key] = last
        for own in reversed(path):
            known = (page for page in self._table.of_digest(own.digest) if page.parent is last)
            child = next((page for page in known if page.token_bytes == own.token_bytes), None)
            if child is None:
                (child,) = self._ghosts(last, token_array(own.token_bytes))
            last = child
        return last

    def _leave(self, page: WindowPage) -> None:
        """Takes an evictable page out of the cache; what continues it finds a ghost there."""
        del self._by_page[page.page]
        page.page = -1
        self._forget(page)

    def _forget(self, page: WindowPage) -> None:
        """Forgets a ghost that nothing continues, and what it alone continued."""
        while page.parent is not None and page.page < 0 and not page.num_children:
            self._table.remove(page)
            page = page.parent
            page.num_children -= 1
        if page.parent is None and not page.num_children:
            del self._roots[namespace_key(page.namespace)]
