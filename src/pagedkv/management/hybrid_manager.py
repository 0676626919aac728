"""The manager of a model whose layers have different windows or geometry: groups of layers on one budget of pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..shapes import check_int
from ..storage import PageTable
from .draw import draw
from .events import CacheEvent, take_events
from .eviction import EvictionPolicy
from .hybrid_sequence import HybridSequence
from .hybrid_step import HybridStepBatch, commit_step, reserve_step, step_needs
from .hybrid_swap import swap_in_parts, swap_out_parts
from .integrity import check_integrity
from .ledger import PageLedger
from .manager import KVCacheManager
from .manager_arguments import check_window, checked_counts, checked_parents
from .manager_options import keeps_windows, num_pages_kept_free, prefix_cache_of
from .page_budget import CopyingPool, PageBudget
from .pinned import PinnedPrefix
from .prefix_cache import Namespace, namespace_key
from .radix_tree import check_priority
from .stats import ManagerStats, count_pages
from .swap_tier import SwapTier
from .token_ids import TokenIds, as_token_array
from .whole_call import reading_call, whole_call, within

__all__ = ["HybridKVCacheManager", "PageGroup"]


class PageGroup(Protocol):
    """What the management needs of a group of layers; LayerGroup is one."""

    @property
    def window(self) -> int | None:
        """How many tokens each token sees, itself included; None for all."""

    @property
    def page_size(self) -> int:
        """Tokens that a page of the group holds."""


class HybridKVCacheManager:
    """Who owns which page of one pool whose pages go to any of several groups of layers.

    pool_or_num_pages: a HybridKVPool, whose groups are taken over; or a number of pages, with `groups`.
    groups:       window and page size of each group of layers. All pages have the same number of bytes.
    prefix_cache: keep full pages after their sequence closed, until room is needed: of a group with a window what a
                  window sees, of another all. False: `open` finds nothing. A prompt begins with the longest prefix that
                  all groups have, in tokens that are whole pages of each (`alignment`).
    eviction, watermark, num_reserved_pages, tier, events, debug: as for KVCacheManager.
    managers:     what has the books of each group, in order: for inspection.
    Rule:    every call is made for all groups or, raising, for none. Layers of one window need as many pages as their
             window has, however long their sequences are; what they do not need the other groups can have.
    Threads, Interrupts: as for KVCacheManager.

    >>> from pagedkv.storage import LayerGroup
    >>> full, sliding = LayerGroup((0,), None, 8), LayerGroup((1, 2), 4, 4)
    >>> manager = HybridKVCacheManager(10, [full, sliding])
    >>> seq = manager.open([])
    >>> [slots.tolist() for slots in seq.append(3)]
    [[0, 1, 2], [4, 5, 6]]
    >>> seq.commit([1, 2, 3])
    """

    def __init__(
        self,
        pool_or_num_pages: CopyingPool | int,
        groups: Sequence[PageGroup] | None = None,
        prefix_cache: bool = True,
        eviction: str | EvictionPolicy = "lru",
        *,
        watermark: int | float = 0,
        num_reserved_pages: int = 0,
        tier: SwapTier | None = None,
        events: bool = False,
        debug: bool = False,
    ) -> None:
        pool, num_pages, groups = _pool_and_groups(pool_or_num_pages, groups)
        if not isinstance(prefix_cache, bool):
            raise TypeError(f"prefix_cache must be a bool, got {type(prefix_cache).__name__}.")
        kept_free = num_pages_kept_free(watermark, num_pages)
        caches = [prefix_cache_of(prefix_cache, one.page_size, eviction, one.window, events) for one in groups]
        self._budget = PageBudget(num_pages, pool, num_reserved_pages, kept_free)
        self._tier = tier
        self.groups = groups
        self.alignment = math.lcm(*(group.page_size for group in groups))
        self.managers = tuple(
            KVCacheManager._of_group(
                PageLedger(self._budget, one.page_size, cache, window=one.window if keeps_windows(cache) else None),
                one.window,
            )
            for one, cache in zip(groups, caches, strict=True)
        )
        if debug:
            self._budget.verify = lambda: check_integrity(self)

    @property
    def pool(self) -> CopyingPool | None:
        """The pool it was made with, if any."""
        return self._budget.pool

    @property
    def num_pages(self) -> int:
        """All pages."""
        return self._budget.allocator.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages without an owner."""
        return self._budget.allocator.num_free

    @property
    def num_evictable_pages(self) -> int:
        """Cached pages that an append can take at once."""
        return self._budget.num_evictable

    @property
    def budget(self) -> PageBudget:
        """The books of its pages, for inspection; `check_integrity` reads them."""
        return self._budget

    def open(self, token_ids: TokenIds, namespace: Namespace = None, *, priority: int = 0) -> HybridSequence:
        """A sequence that begins with the longest prefix of `token_ids` that all groups have cached, and locks it.

        The ids beyond `seq.num_cached_tokens` are not remembered; see `KVCacheManager.open`.
        """
        check_priority(priority)
        ids = as_token_array("token_ids", token_ids)
        namespace_key(namespace)
        return self._open(ids, namespace, priority)

    @whole_call
    def _open(self, ids: npt.NDArray[Any], namespace: Namespace, priority: int) -> HybridSequence:
        known = ids[: self._num_found(ids, namespace)]
        parts = tuple(
            manager._opened(known, namespace, group.window, priority, ids.shape[0])
            for manager, group in zip(self.managers, self.groups, strict=True)
        )
        if self._budget.caches:
            self._budget.counters.count_lookup(ids.shape[0], known.shape[0])
        return HybridSequence(parts)

    def _num_found(self, ids: npt.NDArray[Any], namespace: Namespace) -> int:
        """How long the longest prefix is that all groups have, in tokens that are whole pages of each."""
        num_found: int = ids.shape[0] // self.alignment * self.alignment
        num_agreed = 0
        while num_found and num_agreed < len(self.managers):
            # A window may have less of a shorter prefix, so whoever shortens it asks all others again.
            ledger = self.managers[num_agreed]._ledger
            cache, _ = ledger.cache_of(namespace)
            num_cached = 0 if cache is None else cache.match(ids[:num_found], namespace).num_tokens
            if num_cached < num_found:
                num_found, num_agreed = num_cached // self.alignment * self.alignment, 0
            else:
                num_agreed += 1
        return num_found

    @reading_call
    def can_append(self, num_tokens: int) -> bool:
        """True when a new sequence that finds nothing in the cache could append `num_tokens` now."""
        check_int("num_tokens", num_tokens, minimum=1)
        needed = sum(-(-num_tokens // group.page_size) for group in self.groups)
        return self._budget.can_obtain(needed, self._budget.num_kept_free)

    @whole_call
    def batch(self, seqs: Iterable[HybridSequence], num_tokens: int | TokenIds = 1) -> HybridStepBatch:
        """Reserves the next tokens of all `seqs` in every group; what the step needs, group by group, as tensors.

        See `KVCacheManager.batch`. Raises: OutOfPagesError when there are too few pages for all; nothing has changed.
        """
        parts, counts = self._checked_step(seqs, num_tokens, "a step")
        return reserve_step(self._budget, [manager._planner for manager in self.managers], parts, counts)

    @whole_call
    def can_batch(self, seqs: Iterable[HybridSequence], num_tokens: int | TokenIds = 1) -> bool:
        """True when `batch` with the same arguments would find its pages now."""
        parts, counts = self._checked_step(seqs, num_tokens, "a step")
        needed, kept_free = step_needs([manager._planner for manager in self.managers], parts, counts)
        return self._budget.can_obtain(sum(needed), kept_free)

    def commit(self, seqs: Iterable[HybridSequence], token_ids: TokenIds) -> None:
        """Names one reserved token of each sequence, token_ids [S]; see `KVCacheManager.commit`."""
        ids = as_token_array("token_ids", token_ids)
        rows = list(seqs)
        if ids.shape[0] != len(rows):
            raise ValueError(f"token_ids must have shape [S] with S = {len(rows)} (set by seqs), got [{ids.shape[0]}].")
        self._commit(rows, ids)

    @whole_call
    def _commit(self, rows: list[HybridSequence], ids: npt.NDArray[Any]) -> None:
        commit_step([manager._planner for manager in self.managers], self._parts(rows, "commit"), ids)

    @reading_call
    def page_tables(self, seqs: Iterable[HybridSequence]) -> tuple[PageTable, ...]:
        """The page table of a batch in each group, reserved tokens included, on the pool's device."""
        parts = self._parts(list(seqs), "page_tables")
        return tuple(
            within(KVCacheManager.page_table, manager, own) for manager, own in zip(self.managers, parts, strict=True)
        )

    @whole_call
    def reorder(self, beams: Iterable[HybridSequence], parents: TokenIds) -> list[HybridSequence]:
        """Beam search: the i-th sequence returned continues `beams[parents[i]]`; see `KVCacheManager.reorder`."""
        rows = list(beams)
        chosen = checked_parents(len(rows), parents)
        orders = [
            within(KVCacheManager.reorder, manager, own, chosen)
            for manager, own in zip(self.managers, self._parts(rows, "reorder"), strict=True)
        ]
        known = {id(row.parts[0]): row for row in rows}
        return [known.get(id(parts[0])) or HybridSequence(parts) for parts in zip(*orders, strict=True)]

    def pin(self, token_ids: TokenIds, namespace: Namespace = None) -> tuple[PinnedPrefix, ...]:
        """Keeps what all groups have cached of `token_ids` now from being evicted: a pin a group, to be unpinned."""
        ids = as_token_array("token_ids", token_ids)
        namespace_key(namespace)
        return self._pin(ids, namespace)

    @whole_call
    def _pin(self, ids: npt.NDArray[Any], namespace: Namespace) -> tuple[PinnedPrefix, ...]:
        known = ids[: self._num_found(ids, namespace)]
        return tuple(within(KVCacheManager._pin, manager, known, namespace) for manager in self.managers)

    @whole_call
    def swap_out(self, seq: HybridSequence, tier: SwapTier | None = None) -> None:
        """Saves the bytes of all pages of `seq` in a tier and gives the pages back; see `KVCacheManager.swap_out`."""
        chosen = self._tier if tier is None else tier
        self._parts([seq], "swap_out")
        if chosen is None:
            raise ValueError("tier must be given here or to the manager, got None. Use drop to compute it again.")
        swap_out_parts(seq.parts, chosen)

    @whole_call
    def drop(self, seq: HybridSequence) -> None:
        """Gives the pages of `seq` back and keeps its committed ids; published ones stay cached if there is room."""
        self._parts([seq], "drop")
        for part in seq.parts:
            part._drop_to(part.num_committed)

    @whole_call
    def swap_in(self, seq: HybridSequence) -> npt.NDArray[Any]:
        """Puts a sequence that was swapped out or dropped on pages again; see `KVCacheManager.swap_in`."""
        self._check_known([seq])
        seq._align()
        if seq.state not in ("swapped out", "dropped"):
            raise ValueError(f"seq must be swapped out or dropped to be swapped in, got one that is {seq.state}.")
        if seq.state == "swapped out":
            swap_in_parts(seq.parts)
            return np.empty(0, np.int64)
        ids = np.array(seq.token_ids, np.int64)
        known = self._num_found(ids, seq.namespace)
        for part in seq.parts:
            part._find_again(known)
        return ids[known:]

    @whole_call
    def take_copies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pages that were copied on write since the last call, of all groups; see `KVCacheManager.take_copies`."""
        return within(KVCacheManager.take_copies, self.managers[0])

    @whole_call
    def evict(self, num_pages: int | None = None) -> int:
        """Takes up to `num_pages` pages that prefix caches alone hold from them; see `KVCacheManager.evict`."""
        return within(KVCacheManager.evict, self.managers[0], num_pages)

    @reading_call
    def stats(self) -> ManagerStats:
        """The state of all groups together; see `ManagerStats`."""
        return count_pages(self._budget)

    @whole_call
    def take_events(self) -> list[CacheEvent]:
        """What the prefix caches of all groups stored and removed since the last call; see docs/kv_events.md."""
        return take_events(self._budget.caches)

    @whole_call
    def settle(self) -> None:
        """Makes the books agree after an interrupt, as every call does before its own work."""

    def draw(self, *, form: str = "text", width: int | None = None, color: bool = False, tree: bool = True) -> str:
        """A picture of who owns which page, "text" or "svg"; sequences appear once for each group."""
        return draw(self, form=form, width=width, color=color, tree=tree)

    def _checked_step(
        self, seqs: Iterable[HybridSequence], num_tokens: int | TokenIds, call: str
    ) -> tuple[list[list[Any]], int | npt.NDArray[np.int64]]:
        rows = list(seqs)
        most = self.num_pages * max(group.page_size for group in self.groups) + 1
        counts = checked_counts(len(rows), num_tokens, most)
        return self._parts(rows, call), counts

    def _parts(self, rows: list[HybridSequence], call: str) -> list[list[Any]]:
        """The parts of open sequences of this manager, group by group."""
        self._check_known(rows)
        for row in rows:
            row._check_open(call)
        return [[row.parts[number] for row in rows] for number in range(len(self.managers))]

    def _check_known(self, rows: list[HybridSequence]) -> None:
        for number, row in enumerate(rows):
            if not isinstance(row, HybridSequence):
                raise TypeError(f"seqs must be hybrid sequences, got {type(row).__name__} at position {number}.")
            if row._budget is not self._budget:
                raise ValueError(f"seqs must be sequences of this manager, got another's at position {number}.")

    def __repr__(self) -> str:
        return (
            f"HybridKVCacheManager(num_pages={self.num_pages}, groups={len(self.groups)}, free={self.num_free_pages}, "
            f"evictable={self.num_evictable_pages})"
        )


def _pool_and_groups(
    pool_or_num_pages: CopyingPool | int, groups: Sequence[PageGroup] | None
) -> tuple[CopyingPool | None, int, tuple[PageGroup, ...]]:
    pool = None
    if isinstance(pool_or_num_pages, int):
        check_int("num_pages", pool_or_num_pages, minimum=1)
        num_pages = pool_or_num_pages
        if groups is None:
            raise ValueError("groups must be given with a number of pages, got None.")
    else:
        for attribute in ("groups", "num_pages", "device", "copy_pages"):
            if not hasattr(pool_or_num_pages, attribute):
                raise TypeError(f"pool_or_num_pages must be a hybrid pool, got {type(pool_or_num_pages).__name__}.")
        if groups is not None:
            raise ValueError("groups must be left out with a pool, which has its own, got some.")
        pool, num_pages, groups = pool_or_num_pages, pool_or_num_pages.num_pages, pool_or_num_pages.groups  # type: ignore[attr-defined]
    groups = tuple(groups)
    if not groups:
        raise ValueError("groups must be at least one, got none.")
    for group in groups:
        check_int("page_size", group.page_size, minimum=1)
        check_window(group.window)
    return pool, num_pages, groups
