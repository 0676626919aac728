"""What the two cores of a RadixCache have in common: the calls, and the checks that are Python in both."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..shapes import check_int
from .allocator import PageArray, PageIds
from .eviction import EvictionPolicy
from .prefix_cache import CacheHandle, MatchResult, Namespace, namespace_key
from .radix_node import RadixNode
from .token_ids import TokenArray, TokenIds

__all__ = [
    "Growth",
    "RadixTree",
    "as_page_array",
    "check_priority",
    "drop_empty_roots",
    "names_pages",
    "new_first_version",
]

# The versions of a tree's nodes, which are in its handles, are no other tree's.
_VERSIONS = count(2**32, 2**32)

# A root of a namespace, as a core names it.
Root = Any


class Growth(NamedTuple):
    """What an insert did: `num_cached` tokens were there, the rest continues `parent_page`, None for none."""

    num_cached: int
    handle: CacheHandle
    parent_page: int | None
    root: Root


class RadixTree(Protocol):
    """A core: one tree a namespace, whose roots the caller keeps in `roots`. Handles name at least one page.

    Each call checks what it is given before it changes anything. `RadixCache` says what the calls mean.
    """

    roots: dict[Any, Root]
    # Of what handles have for a node.
    node_type: type[Any]

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

    def empty_root(self) -> Root | None:
        """A root without nodes, which never had one or lost the last, or None."""

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

    def held_pages(self) -> PageArray:
        """All pages, the least first."""

    def nodes(self) -> Iterator[RadixNode]:
        """Every node, roots with nodes included, parents before children."""

    def defect(self) -> str:
        """What is wrong with the structures beside the nodes, or nothing."""


def new_first_version() -> int:
    """Where the versions of the nodes of a new tree begin; it has 2**32 of them."""
    return next(_VERSIONS)


def names_pages(handle: CacheHandle, tree: RadixTree, first_versions: Container[int]) -> bool:
    """False for an empty handle, which all caches take; refuses one that no tree of these first versions gave.

    Whether what it names is still there is looked at by `tree`.
    """
    if not isinstance(handle, CacheHandle):
        raise TypeError(f"handle must be one of this cache, got {type(handle).__name__}.")
    node, version, num_tokens = handle
    if type(version) is not int or type(num_tokens) is not int:
        raise TypeError(f"handle must be one of this cache, got one with {version!r} and {num_tokens!r} for numbers.")
    if num_tokens == 0:
        return False
    is_node = type(node) is tree.node_type and (not isinstance(node, int) or -1 < node < 2**31)
    if not is_node or version & -(2**32) not in first_versions or not 0 < num_tokens < 2**63:
        raise ValueError(f"handle must be one of this cache, got one of {num_tokens} tokens of another.")
    return True


def drop_empty_roots(tree: RadixTree) -> None:
    """Forgets the namespaces that have no nodes."""
    # One by one and the name first, so that what an interrupt leaves is found the next time.
    while (root := tree.empty_root()) is not None:
        key = namespace_key(tree.namespace_of(root))
        if tree.roots.get(key) == root:
            del tree.roots[key]
        tree.drop_root(root)


def check_priority(priority: int) -> None:
    """Refuses what is not an int in [-2**63, 2**63)."""
    if type(priority) is not int or priority < -(2**63):
        check_int("priority", priority, minimum=-(2**63))
    if priority >= 2**63:
        raise ValueError(f"priority must be below 2**63, got {priority}.")


def as_page_array(pages: PageIds) -> npt.NDArray[Any]:
    """`pages` as an array of integers with one dimension, nothing converted but lists."""
    array = pages if isinstance(pages, np.ndarray) else np.array(pages, dtype=None if len(pages) else np.int32)
    if array.ndim != 1:
        raise ValueError(f"pages must have shape [n], got {list(array.shape)}.")
    if array.dtype.kind != "i":
        raise TypeError(f"pages must be integers, got {array.dtype.name}.")
    return array
