"""One sequence: its tokens, the pages that hold their keys and values, and which of those it may write.

Token positions, in half-open intervals; P is the page size and every bound is whole pages unless said otherwise:

    [0, num_cached)                 found in the prefix cache when opened: its pages, shared
    [num_cached, published)         offered to the prefix cache by commit: now its pages too, up to the first duplicate,
                                    a page whose tokens the cache already had on another page. From there on they are
                                    this sequence's alone, and offered once more when the cache dropped its own or the
                                    sequence closes: a lock on pages behind a duplicate would pin the cache's copy
    [published, num_committed)      token ids known, less than a page: this sequence's, or shared with forks of it
    [num_committed, num_tokens)     reserved by append, token ids not known yet (any length)
    [num_tokens, num_pages * P)     the rest of the last page, written by a later append

A page is written by this sequence only from num_tokens on, and only while nobody else owns it: append first replaces a
partly filled last page that has other owners by a copy. Nothing else ever changes the page id of a position.
The lock of the prefix cache ends at the last page that this sequence names and the cache holds. That is at most
`published`, or one page further after a truncate into a published page, or as far as a fork has published pages that
both name.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import torch

from ..kernels.compare_key import common_prefix_len
from ..shapes import check_int
from .allocator import PageArray
from .growing_array import GrowingArray
from .ledger import PageLedger
from .radix_cache import CacheHandle, Namespace
from .token_ids import TokenArray, TokenIds, as_token_ids

__all__ = ["Sequence"]


class Sequence:
    """A growing list of tokens on pages of a manager; made by `KVCacheManager.open` and `fork`.

    When:   append, write the keys and values into the slots, commit the token ids; repeat; close.
    Owns:   its count of each page it names. Not closed, it keeps them: close it, or open it in a `with` statement.
    Raises: ValueError for any call but `close` once it is closed. Every call holds the manager's lock.

    >>> manager = KVCacheManager(8, page_size=4)
    >>> with manager.open([1, 2, 3, 4, 5]) as seq:
    ...     slots = seq.append(5)
    ...     seq.commit([1, 2, 3, 4, 5])
    >>> manager.open([1, 2, 3, 4, 9]).num_cached_tokens
    4
    """

    def __init__(
        self, ledger: PageLedger, namespace: Namespace, tokens: TokenArray, pages: PageArray, handle: CacheHandle | None
    ) -> None:
        """For the manager: `pages` are retained and `handle` is locked, and this sequence gives them back."""
        self._ledger = ledger
        self._namespace = namespace
        self._tokens = GrowingArray(tokens)
        self._pages = GrowingArray(pages)
        self._num_tokens = int(tokens.shape[0])
        self._num_cached_tokens = self._num_tokens
        self._published = self._num_tokens
        self._handle = handle
        self._is_closed = False
        ledger.live[id(self)] = self

    @property
    def num_tokens(self) -> int:
        """Tokens that have a slot: committed ones, and those reserved since."""
        return self._num_tokens

    @property
    def num_committed(self) -> int:
        """Tokens whose ids are known."""
        return self._tokens.size

    @property
    def num_cached_tokens(self) -> int:
        """Leading tokens that were in the prefix cache when this sequence was opened and that it still has."""
        return self._num_cached_tokens

    @property
    def page_ids(self) -> tuple[int, ...]:
        """Its pages in order of position."""
        with self._ledger.lock:
            return tuple(self._pages.view().tolist())

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the committed tokens."""
        with self._ledger.lock:
            return tuple(self._tokens.view().tolist())

    @property
    def namespace(self) -> Namespace:
        """With whom it shares cached pages."""
        return self._namespace

    @property
    def is_closed(self) -> bool:
        """True once it gave its pages back."""
        return self._is_closed

    @property
    def lock_handle(self) -> CacheHandle | None:
        """What it locks of the prefix cache, for inspection."""
        return self._handle

    def append(self, num_tokens: int) -> torch.Tensor:
        """Reserves the next `num_tokens` tokens and returns their slots, int64 [num_tokens] on the pool's device.

        When:   before the keys and values of these tokens are written. A partly filled last page that forks, or the
                prefix cache after a truncate, own too is replaced by a copy first: without a pool the caller copies it,
                see `KVCacheManager.take_copies`.
        Raises: OutOfPagesError when free and evictable pages together are too few; nothing has changed then.
        """
        check_int("num_tokens", num_tokens, minimum=1)
        with self._ledger:
            self._check_open("append")
            return self._append(num_tokens)

    def try_append(self, num_tokens: int) -> torch.Tensor | None:
        """The same, or None when there are too few pages."""
        check_int("num_tokens", num_tokens, minimum=1)
        with self._ledger:
            self._check_open("try_append")
            return self._append(num_tokens) if self._fits(num_tokens) else None

    def can_append(self, num_tokens: int) -> bool:
        """True when `append(num_tokens)` would find its pages now."""
        check_int("num_tokens", num_tokens, minimum=1)
        with self._ledger:
            self._check_open("can_append")
            return self._fits(num_tokens)

    def commit(self, token_ids: TokenIds) -> None:
        """Names the reserved tokens, and publishes the pages that are full now to the prefix cache.

        Shapes: token_ids [n], n up to num_tokens - num_committed: the ids of the next tokens. Or all ids of the
                sequence, n = num_tokens, beginning with the committed ones: longer than what is pending, so never both.
        When:   after the keys and values of these tokens are written.
        Raises: ValueError for another length, or ids that differ from the committed ones; nothing has changed then.
        """
        ids = as_token_ids("token_ids", token_ids)
        with self._ledger:
            self._check_open("commit")
            new_ids = self._new_ids(ids)
            self._check_as_forks_committed(new_ids)
            self._commit(new_ids)

    def fork(self) -> Sequence:
        """A second sequence with the same tokens on the same pages, the partly filled last one included.

        When:   after the keys and values of all reserved tokens are written; the ids that both commit later for these
                are equal.
        Owns:   whoever appends to the shared last page first gets a copy of it.
        """
        with self._ledger:
            self._check_open("fork")
            child = Sequence(self._ledger, self._namespace, self._tokens.view(), self._pages.view(), self._handle)
            child._num_tokens = self._num_tokens
            child._num_cached_tokens = self._num_cached_tokens
            child._published = self._published
            self._ledger.allocator.retain(self._pages.view())
            if self._ledger.cache is not None and self._handle is not None:
                self._ledger.cache.lock(self._handle)
            return child

    def truncate(self, num_tokens: int) -> None:
        """Forgets all tokens from `num_tokens` on, committed or not, and gives back pages that held only those.

        When:   rejected draft tokens of speculative decoding. What was published stays in the prefix cache.
        """
        check_int("num_tokens", num_tokens, minimum=0)
        with self._ledger:
            self._check_open("truncate")
            if num_tokens > self._num_tokens:
                raise ValueError(f"num_tokens must be at most {self._num_tokens} (the sequence), got {num_tokens}.")
            self._truncate(num_tokens)

    def close(self) -> None:
        """Gives its pages back: published ones stay cached, others are free unless a fork names them. Idempotent."""
        with self._ledger:
            if self._is_closed:
                return
            self._publish_behind_duplicates()
            self._move_lock(None)
            self._ledger.allocator.release(self._pages.view())
            del self._ledger.live[id(self)]
            self._pages.truncate(0)
            self._is_closed = True

    def __copy__(self) -> Sequence:
        raise TypeError("a sequence must be forked to have a second one, got a call of copy. Use fork().")

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a sequence must stay with its manager, got a call of pickle or deepcopy. Use fork().")

    def __enter__(self) -> Sequence:
        self._check_open("__enter__")
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{self._pages.size} pages"
        return f"Sequence({self._num_tokens} tokens, {self.num_committed} committed, {state})"

    def _check_open(self, call: str) -> None:
        if self._is_closed:
            raise ValueError(f"a sequence must be open for {call}, got a closed one. Open a new one.")

    def _pages_to_add(self, num_tokens: int) -> tuple[int, bool]:
        """New pages that `num_tokens` more tokens need, and whether the last page must be replaced by a copy too."""
        page_size = self._ledger.page_size
        num_new = -(-(self._num_tokens + num_tokens) // page_size) - self._pages.size
        is_partial = self._num_tokens % page_size != 0
        return num_new, is_partial and self._ledger.allocator.num_owners(self._last_page()) > 1

    def _fits(self, num_tokens: int) -> bool:
        num_new, must_copy = self._pages_to_add(num_tokens)
        return self._ledger.can_obtain(num_new + must_copy)

    def _append(self, num_tokens: int) -> torch.Tensor:
        ledger, page_size = self._ledger, self._ledger.page_size
        num_new, must_copy = self._pages_to_add(num_tokens)
        if num_new or must_copy:
            pages = ledger.obtain(num_new + must_copy)
            if must_copy:
                self._replace_last_page(pages)
                pages = pages[1:]
            self._pages.extend(pages)
        start = self._num_tokens
        self._num_tokens += num_tokens
        offsets = np.arange(start % page_size, start % page_size + num_tokens, dtype=np.int64)
        pages = self._pages.view(start // page_size)
        slots = pages[offsets // page_size] * np.int64(page_size) + offsets % page_size
        return torch.from_numpy(slots).to(ledger.device)

    def _replace_last_page(self, obtained: PageArray) -> None:
        """Puts a copy of the last page, on obtained[0], in its place; gives `obtained` back if the copy fails."""
        ledger, shared = self._ledger, self._last_page()
        try:
            ledger.copy_page(shared, int(obtained[0]))
        except BaseException:
            ledger.allocator.free(obtained)
            raise
        self._pages.put(self._pages.size - 1, obtained[:1])
        self._lock_up_to(self._num_tokens // ledger.page_size * ledger.page_size)
        ledger.allocator.release([shared])

    def _new_ids(self, ids: TokenArray) -> TokenArray:
        """The ids of `ids` that are not committed yet."""
        committed, pending = self.num_committed, self._num_tokens - self.num_committed
        if 1 <= ids.shape[0] <= pending:
            return ids
        if not committed or ids.shape[0] != self._num_tokens:
            wanted = f"the next 1..{pending} ids" if pending else "no more ids (append first)"
            raise ValueError(
                f"token_ids must be {wanted} or all {self._num_tokens} of the sequence, got {ids.shape[0]} ids."
            )
        differs = ids[:committed] != self._tokens.view()
        if differs.any():
            position = int(differs.argmax())
            raise ValueError(
                f"token_ids must begin with the committed ids, got {ids[position]} instead of "
                f"{self._tokens.view()[position]} at position {position}."
            )
        return ids[committed:]

    def _check_as_forks_committed(self, new_ids: TokenArray) -> None:
        """Refuses other ids than a fork has published already for a page that both name."""
        committed, cache = self.num_committed, self._ledger.cache
        if cache is None or self._handle is None or self._handle.num_tokens <= committed:
            return
        known = cache.locked_tokens(self._handle, committed)[: new_ids.shape[0]]
        differs = known != new_ids[: known.shape[0]]
        if differs.any():
            position = int(differs.argmax())
            raise ValueError(
                f"token_ids must be those that a fork committed for the same pages, got {new_ids[position]} instead of "
                f"{known[position]} at position {committed + position}. Fork before the tokens are appended."
            )

    def _commit(self, new_ids: TokenArray) -> None:
        # The ids are put behind the committed ones but do not count until publishing them, which can refuse, is done.
        self._tokens.put(self.num_committed, new_ids)
        num_committed = self.num_committed + new_ids.shape[0]
        full = num_committed // self._ledger.page_size * self._ledger.page_size
        if full > self._published:
            self._publish(full)
            self._published = full
        self._tokens.size = num_committed

    def _publish(self, stop: int) -> None:
        """Offers tokens [end of the lock, stop) to the prefix cache, and locks what it took.

        Starts at the lock, not at `published`: duplicates in between are taken when the cache has dropped its own.
        """
        ledger, page_size = self._ledger, self._ledger.page_size
        cache = ledger.cache
        start = 0 if self._handle is None else self._handle.num_tokens
        if cache is None or start >= stop:
            return
        ids, pages = self._tokens.view(start, stop), self._pages.view(start // page_size, stop // page_size)
        if self._handle is None:
            result = cache.insert(ids, pages, self._namespace, only_new=True)
        else:
            result = cache.extend(self._handle, ids, pages, only_new=True)
        if result.num_cached == 0:
            ledger.allocator.retain(pages)
            self._move_lock(result.handle)
            if (ledger.allocator.owner_counts_of(pages) > 2).any():
                self._lock_for_forks(result.handle)

    def _publish_behind_duplicates(self) -> None:
        """Before a close: leaves the cache what it does not have, on top of its own pages for what it has."""
        ledger, page_size = self._ledger, self._ledger.page_size
        start = 0 if self._handle is None else self._handle.num_tokens
        pages = self._pages.view(0, self._published // page_size)
        # A page that a fork names stays unpublished: the fork does not lock it, and publishes it itself.
        is_mine = ledger.allocator.owner_counts_of(pages[start // page_size :]) == 1
        if ledger.cache is None or not is_mine.size or not is_mine.all():
            return
        result = ledger.cache.insert(self._tokens.view(0, self._published), pages, self._namespace)
        ledger.allocator.retain(pages[result.num_cached // page_size :])

    def _lock_for_forks(self, handle: CacheHandle) -> None:
        """Extends the locks of sequences that name pages which were just published: forks made before the commit."""
        cache, page_size = self._ledger.cache, self._ledger.page_size
        for fork in self._ledger.live.values():
            if fork is self or cache is None:
                continue
            num_shared = common_prefix_len(fork._pages.view(), self._pages.view(0, handle.num_tokens // page_size))
            if num_shared * page_size > (0 if fork._handle is None else fork._handle.num_tokens):
                fork._move_lock(cache.ancestor(handle, num_shared * page_size))

    def _truncate(self, num_tokens: int) -> None:
        ledger, page_size = self._ledger, self._ledger.page_size
        kept = -(-num_tokens // page_size)
        released = self._pages.view(kept).copy()
        self._pages.truncate(kept)
        self._num_tokens = num_tokens
        if num_tokens < self.num_committed:
            self._tokens.truncate(num_tokens)
            self._published = min(self._published, num_tokens // page_size * page_size)
            self._num_cached_tokens = min(self._num_cached_tokens, self._published)
        # A last page that is cut inside and in the cache is still named, so it stays locked until append replaces it.
        keeps_cached_tail = ledger.cache is not None and ledger.cache.holds(self._pages.view()[-1:]).any()
        self._lock_up_to(kept * page_size if keeps_cached_tail else num_tokens // page_size * page_size)
        ledger.allocator.release(released)

    def _lock_up_to(self, num_tokens: int) -> None:
        """Takes the end of the lock back to `num_tokens` where it reaches further."""
        cache = self._ledger.cache
        if cache is None or self._handle is None or self._handle.num_tokens <= num_tokens:
            return
        self._move_lock(cache.ancestor(self._handle, num_tokens) if num_tokens else None)

    def _move_lock(self, handle: CacheHandle | None) -> None:
        """Locks before it unlocks, so that what both cover is never evictable in between."""
        cache, old = self._ledger.cache, self._handle
        if cache is not None:
            if handle is not None:
                cache.lock(handle)
            if old is not None:
                cache.unlock(old)
        self._handle = handle

    def _last_page(self) -> int:
        return int(self._pages.view(self._pages.size - 1)[0])
