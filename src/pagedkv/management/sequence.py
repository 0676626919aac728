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
partly filled last page that has other owners by a copy. Nothing else ever changes the page id of a position, except
that a window gives pages back.
The lock of the prefix cache ends at the last page that this sequence names and the cache holds. That is at most
`published`, or one page further after a truncate into a published page, or as far as a fork has published pages that
both name. The lock is the claim on the pages under it; each page from there on counts this sequence as an owner.

A sequence with a window of W tokens gives back, at each commit, the pages whose tokens are all more than W - 1 before
the next one: their positions have page -1, and what is later stays where it is. It finds prefixes like any other and
keeps the lock until the window has left the last page under it, since a tree cannot hold an end without its beginning.
For the same reason it publishes only while all its tokens are inside the window.

States, and the calls that lead from one to the next:

    on pages      open, fork; append, commit, truncate, batch are for these alone
    swapped out   KVCacheManager.swap_out: no pages; the bytes of all of them are in a tier     -> swap_in, close
    dropped       KVCacheManager.drop: no pages; the committed ids are kept to compute them again -> swap_in, close
    closed        close: nothing is left
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..kernels.upload import uploaded
from ..shapes import check_int
from .allocator import PageArray
from .prefix_cache import CacheHandle, Namespace, PrefixCache
from .sequence_away import SequenceAway, SequenceState
from .token_ids import TokenIds, as_token_array
from .whole_call import closing_call, reading_call, whole_call

__all__ = ["Sequence", "SequenceState"]


class Sequence(SequenceAway):
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

    @property
    def num_tokens(self) -> int:
        """Tokens that have a slot: committed ones, and those reserved since. What it was when closed or put away."""
        return self._num_tokens if self._row >= 0 else self._counts_at_end[0]

    @property
    def num_committed(self) -> int:
        """Tokens whose ids are known."""
        return self._num_committed if self._row >= 0 else self._counts_at_end[1]

    @property
    def num_cached_tokens(self) -> int:
        """Leading tokens that were in the prefix cache when this sequence was opened and that it still has."""
        return self._num_cached_tokens

    @property
    def page_ids(self) -> tuple[int, ...]:
        """Its pages in order of position; -1 where a window gave one back."""
        with self._budget.lock:
            return tuple(self.row_pages().tolist())

    def row_pages(self) -> PageArray:
        """The same as an array, a view that is valid until the next call of the manager: for inspection."""
        return self._page_view() if self._row >= 0 else np.empty(0, np.int32)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the committed tokens; none once it is closed."""
        with self._budget.lock:
            return tuple(self._rows.tokens.view(self._row).tolist()) if self._row >= 0 else ()

    @property
    def namespace(self) -> Namespace:
        """With whom it shares cached pages."""
        return self._namespace

    @property
    def window(self) -> int | None:
        """How many tokens the next one sees, itself included; None for all."""
        return self._window

    @property
    def num_pages_given_back(self) -> int:
        """Leading pages that the window has left."""
        return int(self._rows.first_page.item(self._row)) if self._row >= 0 else 0

    @property
    def state(self) -> SequenceState:
        """Where its keys and values are."""
        return self._state

    @property
    def is_closed(self) -> bool:
        """True once it gave its pages back for good."""
        return self._state == "closed"

    @property
    def lock_handle(self) -> CacheHandle | None:
        """What it locks of the prefix cache, for inspection."""
        return self._handle

    @property
    def num_locked_tokens(self) -> int:
        """Leading tokens that it has on pages of the prefix cache, for inspection."""
        return self._lock_tokens if self._row >= 0 else 0

    @property
    def cache(self) -> PrefixCache | None:
        """Where its namespace is cached, for inspection."""
        return self._cache

    @whole_call
    def append(self, num_tokens: int) -> torch.Tensor:
        """Reserves the next `num_tokens` tokens and returns their slots, int64 [num_tokens] on the pool's device.

        When:   before the keys and values of these tokens are written. A partly filled last page that forks, or the
                prefix cache after a truncate, own too is replaced by a copy first: without a pool the caller copies it,
                see `KVCacheManager.take_copies`.
        Raises: OutOfPagesError when free and evictable pages together are too few; nothing has changed then.
        """
        check_int("num_tokens", num_tokens, minimum=1)
        self._check_open("append")
        return self._to_tensor(self._append(num_tokens))

    @whole_call
    def try_append(self, num_tokens: int) -> torch.Tensor | None:
        """The same, or None when there are too few pages."""
        check_int("num_tokens", num_tokens, minimum=1)
        self._check_open("try_append")
        return self._to_tensor(self._append(num_tokens)) if self._fits(num_tokens) else None

    @reading_call
    def can_append(self, num_tokens: int) -> bool:
        """True when `append(num_tokens)` would find its pages now."""
        check_int("num_tokens", num_tokens, minimum=1)
        self._check_open("can_append")
        return self._fits(num_tokens)

    def commit(self, token_ids: TokenIds) -> None:
        """Names the reserved tokens, and publishes the pages that are full now to the prefix cache.

        Shapes: token_ids [n], n up to num_tokens - num_committed: the ids of the next tokens. Or all ids of the
                sequence, n = num_tokens, beginning with the committed ones: longer than what is pending, so never both.
        When:   after the keys and values of these tokens are written.
        Raises: ValueError for another length, or ids that differ from the committed ones; nothing has changed then.
        """
        self._commit_ids(as_token_array("token_ids", token_ids))

    @whole_call
    def _commit_ids(self, ids: npt.NDArray[Any]) -> None:
        self._check_open("commit")
        new_ids = self._new_ids(ids)
        self._check_as_forks_committed(new_ids)
        self._commit(new_ids)

    @whole_call
    def fork(self) -> Sequence:
        """A second sequence with the same tokens on the same pages, the partly filled last one included.

        When:   after the keys and values of all reserved tokens are written; the ids that both commit later for these
                are equal.
        Owns:   whoever appends to the shared last page first gets a copy of it.
        """
        self._check_open("fork")
        rows, row, cache = self._rows, self._row, self._cache
        if cache is not None and self._handle is not None:
            cache.lock(self._handle)
        self._budget.allocator.retain(self._own_pages())
        tokens, pages = rows.tokens.view(row), self._page_view()
        child = Sequence(self._ledger, self._namespace, tokens, pages, self._handle, self._window)
        for array in (rows.num_tokens, rows.published, rows.lock_tokens, rows.is_new):
            array[child._row] = array[row]
        child._num_cached_tokens = self._num_cached_tokens
        child._priority = self._priority
        # Their last page is shared now, which whoever plans a step must see.
        rows.changed(row)
        self._ledger.live[id(child)] = child
        return child

    @whole_call
    def truncate(self, num_tokens: int) -> None:
        """Forgets all tokens from `num_tokens` on, committed or not, and gives back pages that held only those.

        When:   rejected draft tokens of speculative decoding. What was published stays in the prefix cache.
        Raises: ValueError when the tokens that are left would see pages that a window gave back.
        """
        check_int("num_tokens", num_tokens, minimum=0)
        self._check_open("truncate")
        if num_tokens > self._num_tokens:
            raise ValueError(f"num_tokens must be at most {self._num_tokens} (the sequence), got {num_tokens}.")
        shortest = self._shortest()
        if num_tokens < shortest:
            raise ValueError(
                f"num_tokens must be at least {shortest}, whose window begins behind the pages that were given back, "
                f"got {num_tokens}. Open the sequence again."
            )
        self._cut(num_tokens)

    @closing_call
    def close(self) -> None:
        """Gives its pages back: published ones stay cached, others are free unless a fork names them. Idempotent.

        What a tier keeps of it is dropped there.
        """
        if self.is_closed:
            return
        self._is_closing = True
        try:
            self._drop_ticket()
            self._counts_at_end = self._num_tokens, self._num_committed
            if self._state == "on pages":
                own = self._publish_behind_duplicates()
                self._move_lock(None)
                if own.shape[0]:
                    self._budget.allocator.release_distinct(own)
        except Exception:
            self._is_closing = False
            raise
        row, self._row = self._row, -1
        self._state = "closed"
        del self._ledger.live[id(self)]
        self._rows.remove(row)

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
        where = f"{self._num_pages} pages" if self._state == "on pages" else self._state
        return f"Sequence({self.num_tokens} tokens, {self.num_committed} committed, {where})"

    def _check_open(self, call: str) -> None:
        if self.is_closed:
            raise ValueError(f"a sequence must be open for {call}, got a closed one. Open a new one.")
        if self._state != "on pages":
            raise ValueError(
                f"a sequence must be on pages for {call}, got one that is {self._state}. "
                "Call KVCacheManager.swap_in first."
            )

    def _to_tensor(self, slots: npt.NDArray[np.int64]) -> torch.Tensor:
        return uploaded(slots, self._budget.device)

    def _new_ids(self, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The ids of `ids` that are not committed yet."""
        committed, num_tokens = self._num_committed, self._num_tokens
        pending = num_tokens - committed
        if 1 <= ids.shape[0] <= pending:
            return ids
        if not committed or ids.shape[0] != num_tokens:
            wanted = f"the next 1..{pending} ids" if pending else "no more ids (append first)"
            raise ValueError(f"token_ids must be {wanted} or all {num_tokens} of the sequence, got {ids.shape[0]} ids.")
        known = self._rows.tokens.view(self._row)
        differs = ids[:committed] != known
        if differs.any():
            position = int(differs.argmax())
            raise ValueError(
                f"token_ids must begin with the committed ids, got {ids[position]} instead of "
                f"{known[position]} at position {position}."
            )
        return ids[committed:]
