"""Names the tokens that a step of decoding has sampled: of all sequences in a few numpy calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .ledger import PageLedger
from .prefix_cache import CacheHandle
from .radix_cache import RadixCache
from .sequence import Sequence

__all__ = ["check_commit", "commit"]

Counts = npt.NDArray[np.int64]

# One call for several has its price, too.
_FEWEST_AT_ONCE = 4


def commit(ledger: PageLedger, seqs: list[Sequence], rows: Counts, token_ids: npt.NDArray[Any]) -> None:
    """Names one reserved token of each sequence, whose rows of the books are `rows`; publishes where that fills a page.

    Raises: what `check_commit` raises. What a cache raises: committed are then those whose pages it had taken, and no
            others.
    """
    check_commit(ledger, seqs, rows, token_ids)
    books, page_size = ledger.rows, ledger.page_size
    books.append_token_each(rows, token_ids)
    committed = books.tokens.size[rows]
    full = (committed % page_size == 0).nonzero()[0]
    published: list[int] = []
    try:
        published += _extend_leaves(ledger, seqs, rows, committed, full)
        for number in np.setdiff1d(full, published, assume_unique=True).tolist() if published else full.tolist():
            seqs[number]._publish_full_pages()
            seqs[number]._give_back_behind_window()
            published.append(number)
    except Exception:
        books.tokens.size[np.delete(rows, published)] -= 1
        raise
    windows = books.window[rows]
    if np.count_nonzero(windows):
        has_left = (windows > 0) & ((committed - windows + 1) // page_size > books.first_page[rows])
        for number in has_left.nonzero()[0].tolist():
            seqs[number]._give_back_behind_window()


def _extend_leaves(
    ledger: PageLedger, seqs: list[Sequence], rows: Counts, committed: Counts, full: Counts
) -> list[int]:
    """Publishes the new pages of sequences among `full` in one call, where their end of the cache only grows; returns
    which those are.
    """
    cache, books, page_size = ledger.cache, ledger.rows, ledger.page_size
    is_plain = not (ledger.limited or ledger.allocator.num_extra_owners or np.count_nonzero(books.window[rows]))
    if type(cache) is not RadixCache or not is_plain or len(full) < _FEWEST_AT_ONCE:
        return []
    # What a fork has published for it is locked, though its own tokens do not reach there yet.
    ends = books.lock_tokens[rows[full]]
    is_behind = np.maximum(ends, books.published[rows[full]]) < committed[full]
    chosen, handles, priorities = [], [], []
    for number, end in zip(full[is_behind].tolist(), ends[is_behind].tolist(), strict=True):
        seq = seqs[number]
        handle = seq._handle
        # A lock of fewer tokens than its handle names was cut back by a truncate.
        if handle is not None and handle.num_tokens == end:
            chosen.append(number)
            handles.append(handle)
            priorities.append(seq._priority)
    if not chosen:
        return []
    own, stops = rows[chosen], committed[chosen]
    starts = books.lock_tokens[own]
    grown = cache.extend_leaves(
        handles,
        books.tokens.flat,
        books.tokens.start[own] + starts,
        books.pages.flat,
        books.pages.start[own] + starts // page_size,
        (stops - starts) // page_size,
        priorities,
    )
    books.lock_tokens[own[grown]] = books.published[own[grown]] = stops[grown]
    published = []
    for number, (node, version, _), stop, has_grown in zip(
        chosen, handles, stops.tolist(), grown.tolist(), strict=True
    ):
        if has_grown:
            seqs[number]._handle = CacheHandle(node, version, stop)
            published.append(number)
    return published


def check_commit(ledger: PageLedger, seqs: list[Sequence], rows: Counts, token_ids: npt.NDArray[Any]) -> None:
    """Refuses a sequence without a reserved token, and forks that name different tokens for a page: ValueError."""
    books = ledger.rows
    committed = books.tokens.size[rows]
    has_none = committed >= books.num_tokens[rows]
    if np.count_nonzero(has_none):
        raise ValueError(
            "seqs must have a reserved token without an id each, got none "
            f"at position {int(has_none.argmax())}. Append first."
        )
    if ledger.allocator.num_extra_owners or np.count_nonzero(books.lock_tokens[rows] > committed):
        # Forks of one another: what one publishes the others must agree with.
        _check_forks_agree(ledger, seqs, committed, token_ids)


def _check_forks_agree(
    ledger: PageLedger, seqs: list[Sequence], committed: Counts, token_ids: npt.NDArray[Any]
) -> None:
    """Refuses other ids than forks have published for the same pages, or would publish here."""
    page_size = ledger.page_size
    filled: dict[int, int] = {}
    for number, seq in enumerate(seqs):
        seq._check_as_forks_committed(token_ids[number : number + 1])
        page, offset = divmod(int(committed[number]), page_size)
        if offset + 1 == page_size:
            first = filled.setdefault(seq._page_view(page).item(0), number)
            if token_ids[first] != token_ids[number]:
                raise ValueError(
                    f"token_ids must be equal for forks that share a page, got {token_ids[first]} at position {first} "
                    f"and {token_ids[number]} at position {number}. Fork before the tokens are appended."
                )
    if not filled:
        return
    for number, (seq, position) in enumerate(zip(seqs, committed.tolist(), strict=True)):
        first = filled.get(seq._page_view(position // page_size).item(0), number)
        if position < committed[first]:
            # Not yet at the end of a page that a fork publishes with ids of its own.
            fork = seqs[first]
            known = fork._rows.tokens.view(fork._row, position, position + 1)
            seq._check_equal(known, token_ids[number : number + 1], position)
