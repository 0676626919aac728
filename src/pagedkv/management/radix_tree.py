"""What the two cores of a RadixCache have in common: the calls, and the checks that are Python in both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .allocator import PageArray, PageIds
from .eviction import EvictionPolicy
from .prefix_cache import CacheHandle, MatchResult, Namespace
from .radix_node import RadixNode
from .token_ids import TokenArray, TokenIds

__all__ = ["Growth", "RadixTree", "as_page_array"]

# A root of a namespace, as a core names it.
Root = Any


class Growth(NamedTuple):
    """What an insert did: `num_cached` tokens were there, the rest continues `parent_page`, None for none."""

    num_cached: int
    handle: CacheHandle
    parent_page: int | None
    root: Root


class RadixTree(Protocol):
    """A core: one tree a namespace, whose roots the caller keeps. Handles name at least one page.

    Each call checks what it is given before it changes anything. `RadixCache` says what the calls mean.
    """

    @property
    def num_cached_pages(self) -> int:
        """Pages in the trees."""

    @property
    def num_evictable_pages(self) -> int:
        """Pages in nodes that nothing locks."""

    @property
    def policy(self) -> EvictionPolicy:
        """Who decides what goes first."""

    @property
    def num_bytes(self) -> int:
        """Bytes it keeps."""

    def add_root(self, namespace: Namespace) -> Root:
        """A root without nodes."""

    def drop_root(self, root: Root) -> None:
        """Forgets a root without nodes."""

    def pop_empty_namespaces(self) -> list[Namespace]:
        """Forgets the roots that lost their last node, and says of which namespaces they were."""

    def namespace_of(self, root: Root) -> Namespace:
        """What `add_root` was given."""

    def match(self, root: Root | None, token_ids: TokenIds) -> MatchResult:
        """The longest cached prefix below a root."""

    def insert(self, root: Root, token_ids: TokenIds, pages: PageIds, only_new: bool, priority: int) -> Growth:
        """Adds a prefix below a root."""

    def extend(self, handle: CacheHandle, token_ids: TokenIds, pages: PageIds, only_new: bool, priority: int) -> Growth:
        """Adds tokens behind a prefix."""

    def lock(self, handle: CacheHandle) -> None:
        """Protects a prefix from eviction."""

    def unlock(self, handle: CacheHandle) -> None:
        """Takes back one lock."""

    def ancestor(self, handle: CacheHandle, num_tokens: int) -> CacheHandle:
        """The handle of the first `num_tokens` tokens, at least a page and whole pages."""

    def locked_tokens(self, handle: CacheHandle, start: int) -> TokenArray:
        """Token ids [start, handle.num_tokens)."""

    def evict(self, num_pages: int) -> PageArray:
        """Drops up to `num_pages` pages and returns them."""

    def holds(self, pages: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of `pages` are in the trees."""

    def held_mask(self, num_pages: int) -> npt.NDArray[np.bool_]:
        """For each page 0..num_pages-1 whether it is in the trees."""

    def nodes(self) -> Iterator[RadixNode]:
        """Every node, roots included, parents before children."""

    def defect(self) -> str:
        """What is wrong with the structures beside the nodes, or nothing."""


def as_page_array(pages: PageIds) -> npt.NDArray[Any]:
    """`pages` as an array of integers with one dimension, nothing converted but lists."""
    array = pages if isinstance(pages, np.ndarray) else np.array(pages, dtype=None if len(pages) else np.int32)
    if array.ndim != 1:
        raise ValueError(f"pages must have shape [n], got {list(array.shape)}.")
    if array.dtype.kind != "i":
        raise TypeError(f"pages must be integers, got {array.dtype.name}.")
    return array
