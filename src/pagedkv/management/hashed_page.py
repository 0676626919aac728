"""One page of a hashed cache."""

from __future__ import annotations

from sys import getsizeof
from typing import TYPE_CHECKING

import numpy as np

from .prefix_cache import Namespace
from .token_ids import TokenArray

if TYPE_CHECKING:
    from .hashed_spans import LockSpan

__all__ = ["HashedPage", "WindowPage", "token_array"]


class HashedPage:
    """One cached page, or the root of a namespace, which has no page and no parent.

    locks:   how many locked handles name this page, plus how many locked pages continue it.
    anchors: how many locked handles name this page.
    last_access, num_hits, priority: without the uses of pages that continue it and are still cached. What leaves the
             cache hands its own on to its parent, so they are complete when the page has become a leaf, which is when a
             policy looks at them; a use costs the same for a prompt of any length.
    next_equal: another page of the same digest, if the hash function collides.
    """

    __slots__ = (
        "anchors",
        "created",
        "digest",
        "last_access",
        "locks",
        "namespace",
        "next_equal",
        "num_children",
        "num_hits",
        "page",
        "parent",
        "priority",
        "queued_priority",
        "queued_serial",
        "token_bytes",
    )

    def __init__(
        self, parent: HashedPage | None, namespace: Namespace, digest: bytes, token_bytes: bytes, page: int, time: int
    ) -> None:
        self.parent = parent
        self.namespace = namespace
        self.digest = digest
        self.token_bytes = token_bytes
        self.page = page
        self.created = self.last_access = time
        self.locks = self.anchors = self.num_children = self.num_hits = self.priority = 0
        self.next_equal: HashedPage | None = None
        self.queued_serial: int | None = None
        self.queued_priority: tuple[float, ...] = ()

    @property
    def num_pages(self) -> int:
        """1, or 0 for a root."""
        return int(self.page >= 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of its objects: itself, its tokens, its digest and its numbers."""
        return sum(map(getsizeof, (self, self.token_bytes, self.digest, self.page, self.last_access)))

    @property
    def is_evictable(self) -> bool:
        """True for a page in the cache that nothing locks and nothing continues."""
        return self.locks == 0 and self.num_children == 0 and self.parent is not None


class WindowPage(HashedPage):
    """One position of a prompt in a cache with a window: a cached page, a root, or a ghost.

    A ghost is what is known of a page that the cache does not hold and that others continue: `page` is -1, tokens and
    digest are still here.

    position: pages before it; a root is at -1.
    locks:    how many spans have this page.
    span:     what the locked handles of this page protect, None when there are none.
    created:  when its page came, again after it had left.
    last_access, num_hits, priority: of its own uses alone.
    """

    __slots__ = ("position", "span")

    parent: WindowPage | None
    position: int
    span: LockSpan | None

    @property
    def is_evictable(self) -> bool:
        """True for a page in the cache that nothing locks, whatever continues it."""
        return self.locks == 0 and self.page >= 0


def token_array(token_bytes: bytes) -> TokenArray:
    """Token ids from the bytes of their pages; not to be written to."""
    return np.frombuffer(token_bytes, "<i8").astype(np.int64, copy=False)
