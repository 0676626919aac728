"""The one object an engine talks to: opens sequences, makes batches of them, and says how the pool is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..shapes import check_int
from ..storage import PageTable
from .allocator import PageArray
from .draw import draw
from .events import CacheEvent, take_events
from .eviction import EvictionPolicy
from .integrity import check_integrity
from .ledger import PageLedger
from .manager_arguments import (
    check_known,
    check_on_pages,
    check_window,
    checked_batch,
    checked_beams,
)
from .manager_options import (
    PagedPool,
    keeps_windows,
    namespace_caches,
    num_pages_kept_free,
    pool_and_sizes,
    prefix_cache_of,
)
from .page_budget import CopyingPool, PageBudget
from .pinned import PinnedPrefix
from .prefix_cache import Namespace, PrefixCache, namespace_key
from .radix_tree import check_priority
from .sequence import Sequence
from .stats import ManagerStats, count_pages
from .step_batch import BookedTable, StepBatch
from .step_planner import StepPlanner
from .swap_tier import SwapTier
from .token_ids import TokenIds, as_token_array
from .whole_call import reading_call, whole_call, within

__all__ = ["KVCacheManager"]


class KVCacheManager:
    """Who owns which page of one pool.

    pool_or_num_pages: a pool, whose page size and device are taken over and in which pages are copied on write; or a
                  number of pages, for a caller that keeps the bytes: it gives page_size, and does the copies of
                  `take_copies` itself.
    prefix_cache: keep full pages after their sequence closed, until room is needed: True or "radix" for a tree of runs,
                  "hashed" for a table of pages by hash, or a cache of the caller's. False: `open` finds nothing.
    eviction:     which cached pages go first, a name or a policy (see management/eviction.py).
    window:       how many tokens the tokens of all sequences see, themselves included, where that is one number. The
                  prefix cache is then of the kind that keeps what a window sees ("hashed"; True means it).
    watermark:    pages, or a part of them, that no sequence may take for its first slots, so that running ones find
                  room to grow: a sequence that has had slots is a running one. A prompt that does not fit beside the
                  watermark is never admitted.
    num_reserved_pages: pages 0..n-1 are nobody's, for padded rows and unused entries (see PageAllocator).
    namespace_limits: the pages that a namespace may have cached at most, by namespace. It has a cache of its own then
                  (prefix_cache is True or a name), in which its oldest pages make room for its new ones.
    tier:         where `swap_out` puts pages, for example a HostPageStore.
    events:       note what the prefix caches store and remove, for `take_events`.
    debug:        run `check_integrity` at the end of every public call, of sequences too.
    Owns:   every page of the pool is free, owned (named by a live sequence), cached (held by the prefix cache alone) or
            reserved.
    Threads: any; one lock for the manager and all its sequences. A sequence is usually driven by one thread. Calls that
            a tier, a policy, a signal handler or a finalizer makes inside a call: what changes nothing is answered,
            `close` and `unpin` wait for its end, others are refused.
    Interrupts: a call that an interrupt ends (Ctrl-C) may have been done or not; the next one makes the books agree
            again (see management/settle.py). Sequences keep their tokens and pages, prefix cache and pins are emptied.

    >>> manager = KVCacheManager(10, page_size=4)
    >>> seq = manager.open([1, 2, 3, 4, 5, 6])
    >>> seq.append(6)
    tensor([0, 1, 2, 3, 4, 5])
    >>> seq.commit([1, 2, 3, 4, 5, 6])
    >>> manager.page_table([seq])
    PageTable(num_seqs=1, num_pages=2, page_size=4)
    """

    def __init__(
        self,
        pool_or_num_pages: PagedPool | int,
        page_size: int | None = None,
        prefix_cache: bool | str | PrefixCache = True,
        eviction: str | EvictionPolicy = "lru",
        *,
        window: int | None = None,
        watermark: int | float = 0,
        num_reserved_pages: int = 0,
        namespace_limits: Mapping[Namespace, int] | None = None,
        tier: SwapTier | None = None,
        events: bool = False,
        debug: bool = False,
    ) -> None:
        pool, num_pages, page_size = pool_and_sizes(pool_or_num_pages, page_size)
        check_window(window)
        kept_free = num_pages_kept_free(watermark, num_pages)
        make_cache = partial(prefix_cache_of, page_size=page_size, eviction=eviction, window=window, events=events)
        cache = make_cache(prefix_cache)
        limited = namespace_caches(namespace_limits or {}, prefix_cache, make_cache)
        budget = PageBudget(num_pages, pool, num_reserved_pages, kept_free)
        ledger = PageLedger(budget, page_size, cache, limited, window if keeps_windows(cache) else None)
        self._serve(ledger, window, tier)
        if debug:
            budget.verify = lambda: check_integrity(self)

    def _serve(self, ledger: PageLedger, window: int | None, tier: SwapTier | None) -> None:
        self._ledger = ledger
        self._budget = ledger.budget
        self._window = window
        self._tier = tier
        self._planner = ledger.planner = StepPlanner(ledger, partial(check_on_pages, ledger, "seqs", call="a step"))

    @classmethod
    def _of_group(cls, ledger: PageLedger, window: int | None) -> KVCacheManager:
        """The manager of one group of layers, on a budget that it shares with others."""
        manager = cls.__new__(cls)
        manager._serve(ledger, window, None)
        return manager

    @property
    def pool(self) -> CopyingPool | None:
        """The pool it was made with, if any."""
        return self._budget.pool

    @property
    def page_size(self) -> int:
        """Token slots a page."""
        return self._ledger.page_size

    @property
    def num_pages(self) -> int:
        """All pages."""
        return self._ledger.allocator.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages without an owner."""
        return self._ledger.allocator.num_free

    @property
    def num_evictable_pages(self) -> int:
        """Cached pages that an append can take at once."""
        return self._budget.num_evictable

    @property
    def ledger(self) -> PageLedger:
        """The books of its sequences, for inspection."""
        return self._ledger

    @property
    def budget(self) -> PageBudget:
        """The books of its pages, for inspection; `check_integrity` reads them."""
        return self._budget

    def open(
        self, token_ids: TokenIds, namespace: Namespace = None, *, window: int | None = None, priority: int = 0
    ) -> Sequence:
        """A sequence that begins with the longest cached prefix of `token_ids`, in whole pages; they are locked.

        The ids beyond `seq.num_cached_tokens` are not remembered: append, write and commit them. All of `token_ids` may
        be cached: an engine that needs the logits of the last token opens with `prompt[:-1]`.

        window:   how many tokens each token sees, itself included; pages that are behind it are given back. The
                  manager's if it has one.
        priority: what it publishes is evicted after what has a lower one, where the policy is "priority".
        """
        check_priority(priority)
        ids = as_token_array("token_ids", token_ids)
        namespace_key(namespace)
        check_window(window)
        if self._window is not None and window not in (None, self._window):
            raise ValueError(f"window must be {self._window} (the manager's), got {window}. Leave it out.")
        return self._open(ids, namespace, self._window if window is None else window, priority)

    @whole_call
    def _open(self, ids: npt.NDArray[Any], namespace: Namespace, window: int | None, priority: int) -> Sequence:
        seq = self._opened(ids, namespace, window, priority, ids.shape[0])
        if seq.cache is not None:
            self._budget.counters.count_lookup(ids.shape[0], seq.num_cached_tokens)
        return seq

    def _opened(
        self, ids: npt.NDArray[Any], namespace: Namespace, window: int | None, priority: int, num_expected: int
    ) -> Sequence:
        """A live sequence of what the cache has of `ids`, with room for as many tokens as are expected."""
        ledger = self._ledger
        cache, _ = ledger.cache_of(namespace)
        num_found, pages, handle = ledger.look_up(cache, ids, namespace)
        try:
            seq = Sequence(ledger, namespace, ids[:num_found], pages, handle, window, num_expected)
        except Exception:
            if cache is not None and handle is not None:
                cache.unlock(handle)
            raise
        seq._priority = priority
        ledger.live[id(seq)] = seq
        return seq

    @reading_call
    def can_append(self, num_tokens: int) -> bool:
        """True when a new sequence that finds nothing in the cache could append `num_tokens` now."""
        check_int("num_tokens", num_tokens, minimum=1)
        return self._budget.can_obtain(-(-num_tokens // self.page_size), self._budget.num_kept_free)

    def batch(self, seqs: Iterable[Sequence], num_tokens: int | TokenIds = 1) -> StepBatch:
        """Reserves the next tokens of all `seqs`, and gives what the step needs as tensors on the pool's device.

        num_tokens: new tokens of each sequence, at least 1: one number for all, or one a sequence.
        When:   before the keys and values of the step are written; commit afterwards. Partly filled last pages that
                others have too are replaced by copies first, in one call of the pool's; without a pool the caller
                copies them, see `take_copies`.
        Cost:   made for the same sequences step after step: only what changed is looked at.
        Raises: OutOfPagesError when free and evictable pages together are too few for all; nothing has changed then.
        """
        return self._reserve(*checked_batch(self._ledger, seqs, num_tokens))

    @whole_call
    def _reserve(self, rows: list[Sequence], counts: int | npt.NDArray[np.int64]) -> StepBatch:
        return self._planner.reserve(rows, counts)

    @whole_call
    def can_batch(self, seqs: Iterable[Sequence], num_tokens: int | TokenIds = 1) -> bool:
        """True when `batch` with the same arguments would find its pages now."""
        return self._planner.fits(*checked_batch(self._ledger, seqs, num_tokens))

    def commit(self, seqs: Iterable[Sequence], token_ids: TokenIds) -> None:
        """Names one reserved token of each sequence, as `Sequence.commit` does: what a step of decoding sampled.

        Shapes: token_ids [S].
        Cost:   numpy calls over the sequences; a Python step for each that has filled a page.
        Raises: ValueError when a sequence has no reserved token without an id, and for forks that name different tokens
                for a page they share; nothing has changed then.
        """
        rows = seqs if isinstance(seqs, list) else list(seqs)
        ids = as_token_array("token_ids", token_ids)
        if ids.shape[0] != len(rows):
            raise ValueError(f"token_ids must have shape [S] with S = {len(rows)} (set by seqs), got [{ids.shape[0]}].")
        self._commit(rows, ids)

    @whole_call
    def _commit(self, rows: list[Sequence], ids: npt.NDArray[Any]) -> None:
        self._planner.commit(rows, ids)

    @reading_call
    def page_table(self, seqs: Iterable[Sequence]) -> PageTable:
        """The page table of a batch, reserved tokens included, on the pool's device."""
        ledger, chosen = self._ledger, list(seqs)
        check_on_pages(ledger, "seqs", chosen, "page_table")
        books, rows = ledger.rows, np.fromiter((seq._row for seq in chosen), np.int64, len(chosen))
        indptr, indices = books.pages.snapshot(rows, books.pages.size[rows].astype(np.int32)).read()
        lengths = books.num_tokens[rows].astype(np.int32)
        return BookedTable(indptr, indices, lengths, ledger.page_size, self.num_pages - 1, self._budget.device)

    def pin(self, token_ids: TokenIds, namespace: Namespace = None) -> PinnedPrefix:
        """Keeps what is cached of `token_ids` now, in whole pages, from being evicted until it is unpinned."""
        ids = as_token_array("token_ids", token_ids)
        namespace_key(namespace)
        return self._pin(ids, namespace)

    @whole_call
    def _pin(self, ids: npt.NDArray[Any], namespace: Namespace) -> PinnedPrefix:
        ledger = self._ledger
        cache, _ = ledger.cache_of(namespace)
        match = None if cache is None else cache.match(ids, namespace)
        if cache is None or match is None or not match.num_tokens:
            return PinnedPrefix(ledger, namespace, cache, None, np.empty(0, np.int32))
        cache.lock(match.handle)
        return PinnedPrefix(ledger, namespace, cache, match.handle, match.pages)

    @whole_call
    def swap_out(self, seq: Sequence, tier: SwapTier | None = None) -> None:
        """Saves the bytes of all pages of `seq` in a tier, the manager's if none is given, and gives the pages back.

        When:   between steps: what was reserved is written, and its copies are made.
        Raises: whatever the tier does when it has no room; nothing has changed then.
        """
        check_on_pages(self._ledger, "seq", [seq], "swap_out")
        chosen = self._tier if tier is None else tier
        if chosen is None:
            raise ValueError("tier must be given here or to the manager, got None. Use drop to compute it again.")
        seq._swap_out(chosen)

    @whole_call
    def drop(self, seq: Sequence) -> None:
        """Gives the pages of `seq` back and keeps its committed ids; published ones stay cached if there is room."""
        check_on_pages(self._ledger, "seq", [seq], "drop")
        seq._drop_to(seq.num_committed)

    @whole_call
    def swap_in(self, seq: Sequence) -> npt.NDArray[Any]:
        """Puts a sequence that was swapped out or dropped on pages again.

        Returns the ids, in order, that must be appended, computed and committed again: none after `swap_out`, whose
        pages come back from the tier but for those that the prefix cache still has; after `drop`, all behind the
        longest cached prefix.
        Raises: OutOfPagesError, or what the tier raises: it stays away then, and what was saved stays saved.
        """
        check_known(self._ledger, "seq", [seq])
        if seq.state not in ("swapped out", "dropped"):
            raise ValueError(f"seq must be swapped out or dropped to be swapped in, got one that is {seq.state}.")
        return seq._swap_in()

    @whole_call
    def reorder(self, beams: Iterable[Sequence], parents: TokenIds) -> list[Sequence]:
        """Beam search: the i-th sequence returned continues `beams[parents[i]]`.

        A beam that is continued once stays what it is, further continuations are forks of it, and one that is not
        continued is closed. No page is copied or allocated. `parents` may be shorter or longer than `beams`.
        """
        rows, chosen = checked_beams(self._ledger, beams, parents)
        first = {parent: position for position, parent in reversed(list(enumerate(chosen)))}
        forks: list[Sequence] = []
        continued: list[Sequence] = []
        try:
            for position, parent in enumerate(chosen):
                if first[parent] == position:
                    continued.append(rows[parent])
                else:
                    forks.append(within(Sequence.fork, rows[parent]))
                    continued.append(forks[-1])
            for number, beam in enumerate(rows):
                if number not in first:
                    within(Sequence.close, beam)
        except Exception:  # of a user's cache or policy: nobody gets the forks
            for fork in forks:
                with suppress(Exception):
                    within(Sequence.close, fork)
            raise
        return continued

    @whole_call
    def take_copies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pages that were copied on write since the last call: (src, dst), int64, to be copied all at once.

        A copy of a copy names the first source, and a page that was given back and copied to again is named once.

        When:   without a pool, after the appends of a step and before anything is written. With a pool there are none.
                The sources are not given to anybody else before this call.
        """
        pairs = torch.tensor(self._budget.take_copies(), dtype=torch.int64, device=self._budget.device).reshape(-1, 2)
        return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()

    @whole_call
    def evict(self, num_pages: int | None = None) -> int:
        """Takes up to `num_pages` pages that the prefix cache alone holds from it, all of them for None.

        Appends evict by themselves. Pages that live sequences name or that are pinned stay cached: after a change of
        the model's weights use a new namespace, or close and unpin them first. Returns how many are free now; a page
        that waits to be copied from is after that.
        """
        if num_pages is not None:
            check_int("num_pages", num_pages, minimum=0)
        return self._budget.evict(self._budget.num_evictable if num_pages is None else num_pages)

    @reading_call
    def stats(self) -> ManagerStats:
        """The state now; see `ManagerStats`. Walks the pages of the sequences, not the tree."""
        return count_pages(self._budget)

    @whole_call
    def take_events(self) -> list[CacheEvent]:
        """What the prefix caches stored and removed since the last call, cache by cache; see docs/kv_events.md."""
        return take_events(self._budget.caches)

    @whole_call
    def settle(self) -> None:
        """Makes the books agree after an interrupt, as every call does before its own work."""

    def draw(self, *, form: str = "text", width: int | None = None, color: bool = False, tree: bool = True) -> str:
        """A picture of who owns which page, "text" or "svg"; `management.draw.draw` has more options."""
        return draw(self, form=form, width=width, color=color, tree=tree)

    def step_rows(self) -> Iterator[tuple[Sequence, PageArray]]:
        """The page ids that the table of the last step has for each sequence that was not changed since: inspection."""
        return self._planner.table_rows()

    def __repr__(self) -> str:
        return (
            f"KVCacheManager(num_pages={self.num_pages}, page_size={self.page_size}, free={self.num_free_pages}, "
            f"evictable={self.num_evictable_pages}, num_sequences={len(self._ledger.live)})"
        )
