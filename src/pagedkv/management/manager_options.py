"""What the arguments of a manager mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..shapes import check_choice, check_int
from .eviction import EvictionPolicy
from .hashed_cache import HashedPageCache
from .page_budget import CopyingPool
from .prefix_cache import Namespace, PrefixCache, namespace_key
from .radix_cache import RadixCache

__all__ = ["PagedPool", "keeps_windows", "namespace_caches", "num_pages_kept_free", "pool_and_sizes", "prefix_cache_of"]


class PagedPool(CopyingPool, Protocol):
    """A pool whose pages all hold as many tokens."""

    @property
    def page_size(self) -> int:
        """Token slots a page."""


def pool_and_sizes(pool_or_num_pages: PagedPool | int, page_size: int | None) -> tuple[PagedPool | None, int, int]:
    """The pool, if it is one, the number of pages and the page size."""
    if isinstance(pool_or_num_pages, int):
        check_int("num_pages", pool_or_num_pages, minimum=1)
        if page_size is None:
            raise ValueError("page_size must be given with a number of pages, got None.")
        check_int("page_size", page_size, minimum=1)
        return None, pool_or_num_pages, page_size
    for attribute in ("num_pages", "page_size", "device", "copy_pages"):
        if not hasattr(pool_or_num_pages, attribute):
            raise TypeError(f"pool_or_num_pages must be a pool or an int, got {type(pool_or_num_pages).__name__}.")
    if page_size is not None and page_size != pool_or_num_pages.page_size:
        raise ValueError(f"page_size must be {pool_or_num_pages.page_size} (the pool's), got {page_size}.")
    return pool_or_num_pages, pool_or_num_pages.num_pages, pool_or_num_pages.page_size


def prefix_cache_of(
    prefix_cache: bool | str | PrefixCache,
    page_size: int,
    eviction: str | EvictionPolicy,
    window: int | None = None,
    events: bool = False,
) -> PrefixCache | None:
    """The cache that the argument `prefix_cache` stands for; None for False."""
    if prefix_cache is False:
        return None
    if prefix_cache is True or isinstance(prefix_cache, str):
        name = ("radix" if window is None else "hashed") if prefix_cache is True else prefix_cache
        check_choice("prefix_cache", name, ("radix", "hashed"))
        if name == "radix":
            return RadixCache(page_size, eviction, events=events)
        return HashedPageCache(page_size, eviction, window=window, events=events)
    for attribute in ("match", "insert", "extend", "lock", "unlock", "evict", "page_size"):
        if not hasattr(prefix_cache, attribute):
            raise TypeError(f"prefix_cache must be a bool, a name or a cache, got {type(prefix_cache).__name__}.")
    if prefix_cache.page_size != page_size:
        raise ValueError(f"prefix_cache must have page_size {page_size} (the pool's), got {prefix_cache.page_size}.")
    if keeps_windows(prefix_cache) and prefix_cache.window != window:  # type: ignore[attr-defined]
        raise ValueError(
            f"prefix_cache must have window {window} (the manager's) or none, got {prefix_cache.window}."  # type: ignore[attr-defined]
        )
    if events and prefix_cache.events is None:
        raise ValueError("prefix_cache must be made with events=True to give events, got one without.")
    if prefix_cache.num_cached_pages:
        raise ValueError(f"prefix_cache must be empty, got one of {prefix_cache.num_cached_pages} pages.")
    return prefix_cache


def keeps_windows(cache: PrefixCache | None) -> bool:
    """True for a cache that keeps of each prefix what a window sees, and not all of it."""
    return getattr(cache, "window", None) is not None


def num_pages_kept_free(watermark: int | float, num_pages: int) -> int:
    """The watermark in pages: an int counts them, a float below 1 is a part of all, rounded up."""
    if isinstance(watermark, float):
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark must be a part in [0, 1) or a number of pages, got {watermark}.")
        # 0.07 of 100 pages are 7, though 0.07 * 100 is a little more.
        return math.ceil(round(watermark * num_pages, 6))
    check_int("watermark", watermark, minimum=0)
    if watermark >= num_pages:
        raise ValueError(f"watermark must be below {num_pages} (num_pages), got {watermark}.")
    return watermark


def namespace_caches(
    limits: Mapping[Namespace, int],
    prefix_cache: bool | str | PrefixCache,
    make_cache: Callable[[bool | str | PrefixCache], PrefixCache | None],
) -> dict[Any, tuple[PrefixCache, int]]:
    """A cache for each namespace that has a limit, with the limit, by `namespace_key`."""
    if not isinstance(limits, Mapping):
        raise TypeError(f"namespace_limits must map namespaces to pages, got {type(limits).__name__}.")
    caches = {}
    for namespace, limit in limits.items():
        check_int("a limit of namespace_limits", limit, minimum=0)
        if not isinstance(prefix_cache, (bool, str)):
            raise ValueError("prefix_cache must be True or a name for namespace_limits, got a cache. Name its kind.")
        cache = make_cache(prefix_cache)
        if cache is not None:
            caches[namespace_key(namespace)] = cache, limit
    return caches
