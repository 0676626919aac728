"""The one object an engine talks to: opens sequences, makes batches of them, and says how the pool is used."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ..shapes import check_int
from ..storage import PageTable
from .eviction import EvictionPolicy
from .integrity import check_integrity
from .ledger import PageLedger, PagePool
from .radix_cache import Namespace, RadixCache, namespace_key
from .sequence import Sequence
from .stats import ManagerStats
from .token_ids import TokenIds, as_token_ids

__all__ = ["KVCacheManager"]


class KVCacheManager:
    """Who owns which page of one pool.

    pool_or_num_pages: a pool, whose page size and device are taken over and in which pages are copied on write; or a
                  number of pages, for a caller that keeps the bytes: it gives page_size, and does the copies of
                  `take_copies` itself.
    prefix_cache: keep full pages after their sequence closed, until room is needed; without it `open` finds nothing.
    eviction:     which cached pages go first, a name or a policy (see management/eviction.py).
    debug:        run `check_integrity` at the end of every public call, of sequences too.
    Owns:   every page of the pool is free, owned (named by a live sequence) or cached (held by the prefix cache alone).
    Threads: any; one re-entrant lock for the manager and all its sequences. A sequence is usually driven by one thread.

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
        pool_or_num_pages: PagePool | int,
        page_size: int | None = None,
        prefix_cache: bool = True,
        eviction: str | EvictionPolicy = "lru",
        *,
        debug: bool = False,
    ) -> None:
        pool, num_pages, page_size = _pool_and_sizes(pool_or_num_pages, page_size)
        cache = RadixCache(page_size, eviction) if prefix_cache else None
        self._pool = pool
        self._ledger = PageLedger(num_pages, page_size, pool, cache)
        if debug:
            self._ledger.verify = lambda: check_integrity(self)

    @property
    def pool(self) -> PagePool | None:
        """The pool it was made with, if any."""
        return self._pool

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
        return self._ledger.num_evictable

    @property
    def ledger(self) -> PageLedger:
        """The books, for inspection; `check_integrity` reads them."""
        return self._ledger

    def open(self, token_ids: TokenIds, namespace: Namespace = None) -> Sequence:
        """A sequence that begins with the longest cached prefix of `token_ids`, in whole pages; they are locked.

        The ids beyond `seq.num_cached_tokens` are not remembered: append, write and commit them. All of `token_ids` may
        be cached: an engine that needs the logits of the last token opens with `prompt[:-1]`.
        """
        ids = as_token_ids("token_ids", token_ids)
        namespace_key(namespace)
        ledger = self._ledger
        with ledger:
            if ledger.cache is None:
                return Sequence(ledger, namespace, ids[:0], np.empty(0, np.int32), None)
            match = ledger.cache.match(ids, namespace)
            ledger.counters.lookups += 1
            ledger.counters.asked_tokens += ids.shape[0]
            ledger.counters.hit_tokens += match.num_tokens
            if not match.num_tokens:
                return Sequence(ledger, namespace, ids[:0], match.pages, None)
            ledger.cache.lock(match.handle)
            ledger.allocator.retain(match.pages)
            return Sequence(ledger, namespace, ids[: match.num_tokens], match.pages, match.handle)

    def can_append(self, num_tokens: int) -> bool:
        """True when a new sequence that finds nothing in the cache could append `num_tokens` now."""
        check_int("num_tokens", num_tokens, minimum=1)
        with self._ledger:
            return self._ledger.can_obtain(-(-num_tokens // self.page_size))

    def page_table(self, seqs: Iterable[Sequence]) -> PageTable:
        """The page table of a batch, reserved tokens included, on the pool's device."""
        with self._ledger as ledger:
            rows = self._checked_live("seqs", seqs, "page_table")
            lengths = np.fromiter((seq.num_tokens for seq in rows), np.int32, len(rows))
            indptr = np.zeros(len(rows) + 1, np.int32)
            np.cumsum(-(-lengths // ledger.page_size), out=indptr[1:])
            pages = np.concatenate([np.empty(0, np.int32), *(seq._pages.view() for seq in rows)])
        last = np.where(lengths == 0, 0, (lengths - 1) % ledger.page_size + 1).astype(np.int32)
        tensors = (torch.from_numpy(array).to(ledger.device) for array in (indptr, pages, last))
        return PageTable(*tensors, page_size=ledger.page_size)

    def reorder(self, beams: Iterable[Sequence], parents: TokenIds) -> list[Sequence]:
        """Beam search: the i-th sequence returned continues `beams[parents[i]]`.

        A beam that is continued once stays what it is, further continuations are forks of it, and one that is not
        continued is closed. No page is copied or allocated. `parents` may be shorter or longer than `beams`.
        """
        with self._ledger:
            rows = self._checked_live("beams", beams, "reorder")
            if len({id(beam) for beam in rows}) != len(rows):
                raise ValueError("beams must be different sequences, got one twice. Fork it first.")
            chosen = as_token_ids("parents", parents).tolist()
            for position, parent in enumerate(chosen):
                if parent >= len(rows):
                    raise ValueError(f"parents must be in 0..{len(rows) - 1}, got {parent} at position {position}.")
            first = {parent: position for position, parent in reversed(list(enumerate(chosen)))}
            continued = [
                rows[parent] if first[parent] == position else rows[parent].fork()
                for position, parent in enumerate(chosen)
            ]
            for number, beam in enumerate(rows):
                if number not in first:
                    beam.close()
            return continued

    def take_copies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pages that were copied on write since the last call: (src, dst), int64, to be copied all at once.

        A copy of a copy names the first source, and a page that was given back and copied to again is named once.

        When:   without a pool, after the appends of a step and before anything is written. With a pool there are none.
        """
        with self._ledger as ledger:
            source_of: dict[int, int] = {}
            for src, dst in ledger.pending_copies:
                source_of[dst] = source_of.get(src, src)
            copies = [(src, dst) for dst, src in source_of.items()]
            pairs = torch.tensor(copies, dtype=torch.int64, device=ledger.device).reshape(-1, 2)
            ledger.pending_copies.clear()
        return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()

    def evict(self, num_pages: int | None = None) -> int:
        """Frees up to `num_pages` pages that the prefix cache alone holds, all of them for None; returns how many.

        Appends evict by themselves. Pages that live sequences name stay cached: after a change of the model's weights
        use a new namespace, or close them first.
        """
        if num_pages is not None:
            check_int("num_pages", num_pages, minimum=0)
        with self._ledger as ledger:
            return ledger.evict(ledger.num_evictable if num_pages is None else num_pages)

    def stats(self) -> ManagerStats:
        """The state now; see `ManagerStats`. Walks the sequences and the counts of pages, not the tree."""
        with self._ledger as ledger:
            named = ledger.num_named()
            free = ledger.allocator.num_free
            owned = int(np.count_nonzero(named))
            return ManagerStats(
                num_pages=self.num_pages,
                page_size=self.page_size,
                num_sequences=len(ledger.live),
                free=free,
                owned=owned,
                shared=int(np.count_nonzero(named > 1)),
                cached=self.num_pages - free - owned,
                published=0 if ledger.cache is None else ledger.cache.num_cached_pages,
                evictable=ledger.num_evictable,
                slots_reserved=sum(seq._pages.size for seq in ledger.live.values()) * self.page_size,
                tokens=sum(seq.num_tokens for seq in ledger.live.values()),
                **vars(ledger.counters),
            )

    def _checked_live(self, name: str, seqs: Iterable[Sequence], call: str) -> list[Sequence]:
        rows = list(seqs)
        for number, seq in enumerate(rows):
            if not isinstance(seq, Sequence):
                raise TypeError(f"{name} must be sequences, got {type(seq).__name__} at position {number}.")
            if seq.is_closed:
                raise ValueError(f"{name} must be open sequences for {call}, got a closed one at position {number}.")
            if seq._ledger is not self._ledger:
                raise ValueError(f"{name} must be sequences of this manager, got another's at position {number}.")
        return rows

    def __repr__(self) -> str:
        return (
            f"KVCacheManager(num_pages={self.num_pages}, page_size={self.page_size}, free={self.num_free_pages}, "
            f"evictable={self.num_evictable_pages}, num_sequences={len(self._ledger.live)})"
        )


def _pool_and_sizes(pool_or_num_pages: PagePool | int, page_size: int | None) -> tuple[PagePool | None, int, int]:
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
