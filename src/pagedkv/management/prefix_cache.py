"""What a manager asks of a prefix cache, and the names that all of them share: results, handles, namespaces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .allocator import PageArray, PageIds
from .eviction import EvictionPolicy
from .token_ids import TokenArray, TokenIds

if TYPE_CHECKING:
    from .events import EventLog

__all__ = ["EMPTY_HANDLE", "CacheHandle", "InsertResult", "MatchResult", "Namespace", "PrefixCache", "namespace_key"]

# Who may share with whom, compared by value and type: None, "", 0, False and b"" are five namespaces.
Namespace = str | bytes | int | tuple[Any, ...] | None


class CacheHandle(NamedTuple):
    """Names a cached prefix of `num_tokens` tokens; opaque, and good for the cache that gave it alone.

    Handles of equal node and version have one lock: whoever locked one of them has locked the other.
    """

    node: Any
    version: int
    num_tokens: int


_NO_NAMESPACE = (type(None), None)

# The prefix without tokens, of every namespace: there is nothing to lock.
EMPTY_HANDLE = CacheHandle(None, 0, 0)


class MatchResult(NamedTuple):
    """The longest cached prefix: `pages` [num_tokens / page_size] int32, a copy."""

    num_tokens: int
    pages: PageArray
    handle: CacheHandle


class InsertResult(NamedTuple):
    """`num_cached` tokens were there before, on pages of the cache's; `handle` names the whole run."""

    num_cached: int
    handle: CacheHandle


class PrefixCache(Protocol):
    """An index from runs of tokens to the pages that hold their keys and values.

    Units:  lookups and inserts round down to whole pages; counters count pages.
    When:   a result may be used until the next call that inserts or evicts; lock its handle to use it longer.
    Owns:   copies of token and page ids. A page given to `insert` belongs to the cache until `evict` or `reset`
            returns it; whether it is free then is the allocator's business.
    """

    events: EventLog | None

    @property
    def page_size(self) -> int:
        """Tokens a page."""

    @property
    def num_cached_pages(self) -> int:
        """Pages it holds."""

    @property
    def num_evictable_pages(self) -> int:
        """Pages that nothing locks; `evict` can free all of them."""

    @property
    def eviction_policy(self) -> EvictionPolicy:
        """Who decides what goes first."""

    def match(self, token_ids: TokenIds, namespace: Namespace = None) -> MatchResult:
        """The longest cached prefix of `token_ids`, in whole pages; counts as a use of it."""

    def insert(
        self,
        token_ids: TokenIds,
        pages: PageIds,
        namespace: Namespace = None,
        *,
        only_new: bool = False,
        priority: int = 0,
    ) -> InsertResult:
        """Adds the prefix `token_ids`, whose keys and values are in `pages`; what is there already stays as it is."""

    def extend(
        self, handle: CacheHandle, token_ids: TokenIds, pages: PageIds, *, only_new: bool = False, priority: int = 0
    ) -> InsertResult:
        """The same as inserting what `handle` names followed by `token_ids`, from there on."""

    def lock(self, handle: CacheHandle) -> None:
        """Protects the prefix that `handle` names from eviction until it is unlocked as often; none if empty."""

    def unlock(self, handle: CacheHandle) -> None:
        """Takes back one `lock` of the same handle; counts as a use of the prefix."""

    def ancestor(self, handle: CacheHandle, num_tokens: int) -> CacheHandle:
        """The handle of the first `num_tokens` tokens (whole pages) of a current handle's prefix."""

    def locked_tokens(self, handle: CacheHandle, start: int) -> TokenArray:
        """Token ids [start, handle.num_tokens) of the prefix that a current handle names."""

    def evict(self, num_pages: int) -> PageArray:
        """Drops up to `num_pages` pages that nothing locks and returns them: fewer when there are no more."""

    def reset(self, force: bool = False) -> PageArray:
        """Drops everything and returns the pages; all handles are stale then.

        force: with it locks too, whatever state an interrupt left the cache in.
        Raises: ValueError while a handle is locked, unless forced.
        """

    def holds(self, pages: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of `pages` it holds."""

    def held_mask(self, num_pages: int) -> npt.NDArray[np.bool_]:
        """For each page 0..num_pages-1 whether it is held."""

    def nodes(self) -> Iterator[Any]:
        """What it is made of, for inspection."""


def namespace_key(namespace: object) -> Any:
    """A dict key that is equal only for equal values of equal types, at every depth of a tuple."""
    if namespace is None:
        return _NO_NAMESPACE
    if type(namespace) in (str, bytes, int, bool):
        return (type(namespace), namespace)
    if isinstance(namespace, tuple):
        return (tuple, tuple(map(namespace_key, namespace)))
    raise TypeError(
        f"namespace must be None, a str, bytes, an int or a tuple of these, got {type(namespace).__name__}."
    )
