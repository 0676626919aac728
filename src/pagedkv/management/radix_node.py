"""One node of the radix tree: a run of whole pages and the tokens they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .growing_array import GrowingArray

__all__ = ["RadixNode"]


class RadixNode:
    """A run of pages below its parent; a root has none and no parent.

    Owns:   copies of its token ids (int64) and page ids (int32), never views of a caller's arrays or another node's.
    locks:  how many locked handles protect this node, because they name it or a node below it.
    anchors: how many locked handles name this node itself, so that locks is the sum of anchors below and including it.
    num_before: pages of the nodes above it.
    version: rises when pages leave the node, so never while it is locked. A split and more pages at the end change
            nothing for a handle: what it names ends in this node, or above it when the node was split there.
    """

    __slots__ = (
        "_pages",
        "_tokens",
        "anchors",
        "child_key",
        "children",
        "created",
        "last_access",
        "locks",
        "namespace",
        "num_before",
        "num_hits",
        "num_pages",
        "page_size",
        "parent",
        "priority",
        "queued_priority",
        "queued_serial",
        "version",
    )

    def __init__(
        self,
        parent: RadixNode | None,
        tokens: npt.NDArray[np.int64],
        pages: npt.NDArray[np.int32],
        page_size: int,
        time: int,
        namespace: Any = None,
    ) -> None:
        self.parent = parent
        self.namespace = namespace
        self._tokens, self._pages = GrowingArray(tokens), GrowingArray(pages)
        self.page_size = page_size
        self.num_pages: int = pages.shape[0]
        self.num_before: int = 0 if parent is None else parent.num_before + parent.num_pages
        self.child_key = self.first_page_key()
        self.children: dict[bytes, RadixNode] = {}
        self.locks = self.anchors = self.version = self.num_hits = self.priority = 0
        self.created = self.last_access = time
        self.queued_serial: int | None = None
        self.queued_priority: tuple[float, ...] = ()

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Token ids of the run, a view [num_pages * page_size]."""
        return self._tokens.view()

    @property
    def pages(self) -> npt.NDArray[np.int32]:
        """Page ids of the run, a view [num_pages]."""
        return self._pages.view()

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays it keeps, spare room included."""
        return self._tokens.num_bytes + self._pages.num_bytes

    @property
    def is_evictable(self) -> bool:
        """True for a leaf of the tree that nothing locks."""
        return self.locks == 0 and not self.children and self.parent is not None

    def first_page_key(self) -> bytes:
        """What its parent files it under: the token ids of its first page, compared exactly by the dict."""
        return self._tokens.view(0, self.page_size).tobytes()

    def grow(self, tokens: npt.NDArray[np.int64], pages: npt.NDArray[np.int32]) -> None:
        """Adds pages at the end."""
        self._tokens.extend(tokens)
        self._pages.extend(pages)
        self.num_pages += pages.shape[0]

    def trim(self, num_pages: int) -> npt.NDArray[np.int32]:
        """Drops the last `num_pages` pages, not all of them; returns their ids."""
        kept = self.num_pages - num_pages
        dropped = self._pages.view(kept).copy()
        self._tokens.truncate(kept * self.page_size)
        self._pages.truncate(kept)
        self.num_pages = kept
        self.version += 1
        return dropped

    def split(self, num_pages: int) -> RadixNode:
        """Moves the first `num_pages` pages, not all of them, into a new parent; returns it.

        This node keeps the end of the run, so handles that name it still mean the same tokens. The new parent is locked
        as often, but no handle names it. Both parts get copies: neither keeps the memory of the whole alive.
        """
        parent = self.parent
        assert parent is not None  # a root has no pages to split
        cut = num_pages * self.page_size
        prefix = RadixNode(
            parent, self._tokens.view(0, cut), self._pages.view(0, num_pages), self.page_size, self.created
        )
        prefix.locks, prefix.num_hits, prefix.last_access = self.locks, self.num_hits, self.last_access
        prefix.priority, prefix.version = self.priority, self.version
        self._tokens, self._pages = GrowingArray(self._tokens.view(cut)), GrowingArray(self._pages.view(num_pages))
        self.num_pages -= num_pages
        self.num_before += num_pages
        self.child_key = self.first_page_key()
        self.parent = prefix
        prefix.children[self.child_key] = self
        parent.children[prefix.child_key] = prefix
        return prefix

    def detach(self) -> npt.NDArray[np.int32]:
        """Takes the node out of the tree; returns its page ids."""
        assert self.parent is not None  # only leaves below a root are detached
        self.version += 1
        del self.parent.children[self.child_key]
        self.parent = None
        return self.pages
