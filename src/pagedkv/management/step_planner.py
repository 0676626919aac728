"""Reserves slots for many sequences at once, and keeps the page table from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .allocator import PageArray
from .ledger import PageLedger
from .sequence import Sequence
from .step_batch import BookedTable, StepBatch
from .step_table import StepTable

__all__ = ["StepPlanner"]

Counts = npt.NDArray[np.int64]


class StepPlanner:
    """One manager's: the rows of the sequences of the last step, and the table over them.

    Cost: numpy calls over the sequences, nothing a token; one copy of the table, joined from the parts that stay and
          the pages that are new. Python steps are a sequence only for sequences that joined or were changed otherwise
          (append, truncate, fork, a copy on write), and for a page that is copied.
    """

    def __init__(self, ledger: PageLedger, check: Callable[[list[Sequence]], None]) -> None:
        self._ledger = ledger
        self._check = check
        self._seqs: list[Sequence] = []
        self._rows = np.empty(0, np.int64)
        self._versions = np.empty(0, np.int64)
        self._epoch = -1
        # While the table and the books change, so that what an interrupt leaves is not built upon.
        self._is_changing = False
        self._table = StepTable(ledger.rows, ledger.page_size)
        self._decode_indptr = torch.zeros(1, dtype=torch.int32)
        self._read()

    def fits(self, seqs: list[Sequence], num_tokens: int | Counts) -> bool:
        """True when `reserve` with the same arguments would find its pages."""
        self._follow(seqs)
        num_new = self._num_new_pages(num_tokens)
        return self._ledger.can_obtain(int(num_new.sum()) + len(self._to_copy()), self._num_kept_free(num_new))

    def reserve(self, seqs: list[Sequence], num_tokens: int | Counts) -> StepBatch:
        """Reserves for all sequences or, raising OutOfPagesError, for none."""
        self._follow(seqs)
        num_new = self._num_new_pages(num_tokens)
        grown = num_new.nonzero()[0]
        copied = self._to_copy() if self._may_copy or self._ledger.allocator.num_extra_owners else []
        if grown.shape[0] or copied:
            counts = None if num_new.dtype == np.bool_ else num_new[grown]
            total = grown.shape[0] if counts is None else int(counts.sum())
            pages = self._ledger.obtain(total + len(copied), self._num_kept_free(num_new))
            self._is_changing = True
            if copied:
                self._copy_on_write(copied, pages)
                pages = pages[len(copied) :]
            if total:
                self._table.grow(self._rows, grown, counts, pages)
            if counts is None:
                self._next_slots[grown] = pages * np.int64(self._ledger.page_size)
        self._is_changing = True
        step = self._batch(num_tokens, grown)
        self._is_changing = False
        return step

    def commit(self, seqs: list[Sequence], token_ids: npt.NDArray[Any]) -> None:
        """Names one reserved token of each sequence; publishes where that fills a page.

        Raises: ValueError also for forks that name different tokens for one page; nothing has changed then.
        """
        books, rows = self._ledger.rows, self._rows
        if seqs != self._seqs or self._is_changing or (books.version[rows] != self._versions).any():
            rows = self._rows_of(seqs)
        committed = books.tokens.size[rows]
        has_none = committed >= books.num_tokens[rows]
        if has_none.any():
            raise ValueError(
                "seqs must have a reserved token without an id each, got none "
                f"at position {int(has_none.argmax())}. Append first."
            )
        is_slow = ((committed + 1) % self._ledger.page_size == 0) | (books.window[rows] > 0)
        if self._ledger.allocator.num_extra_owners or (books.lock_tokens[rows] > committed).any():
            # Forks of one another: what one publishes the others must agree with.
            is_slow[:] = True
            self._check_forks_agree(seqs, committed, token_ids)
        for number in np.flatnonzero(is_slow).tolist():
            ids = token_ids[number : number + 1]
            seqs[number]._commit(ids)
        if not is_slow.all():
            books.append_token_each(rows[~is_slow], token_ids[~is_slow])

    def _check_forks_agree(self, seqs: list[Sequence], committed: Counts, token_ids: npt.NDArray[Any]) -> None:
        """Refuses other ids than forks have published for the same pages, or would publish here."""
        page_size = self._ledger.page_size
        published: dict[int, int] = {}
        for number, seq in enumerate(seqs):
            seq._check_as_forks_committed(token_ids[number : number + 1])
            page, offset = divmod(int(committed[number]), page_size)
            if offset + 1 < page_size:
                continue
            first = published.setdefault(seq._page_view(page).item(0), number)
            if token_ids[first] != token_ids[number]:
                raise ValueError(
                    f"token_ids must be equal for forks that share a page, got {token_ids[first]} at position {first} "
                    f"and {token_ids[number]} at position {number}. Fork before the tokens are appended."
                )

    @property
    def table_version(self) -> int:
        """Differs after every change of the table."""
        return self._table.version

    def dense_table(self) -> torch.Tensor:
        """The dense form [S, M] int32 for the last step; see `StepBatch.dense_table`."""
        with self._ledger.lock:
            return self._table.dense(self._rows).to(self._ledger.device)

    def table_rows(self) -> Iterator[tuple[Sequence, PageArray]]:
        """The entries of the CSR form, of sequences that were not changed since the last step otherwise."""
        if self._is_changing:  # by a step that was interrupted
            return
        is_current = self._ledger.rows.version[self._rows] == self._versions
        for number in np.flatnonzero(is_current).tolist():
            start, stop = self._table.indptr[number : number + 2].tolist()
            yield self._seqs[number], self._table.indices[start:stop]

    def _rows_of(self, seqs: list[Sequence]) -> Counts:
        self._check(seqs)
        if len(set(map(id, seqs))) != len(seqs):
            raise ValueError("seqs must be different sequences, got one twice. Fork it first.")
        return np.fromiter((seq._row for seq in seqs), np.int64, len(seqs))

    def _follow(self, seqs: list[Sequence]) -> None:
        """Makes the table one of `seqs` as they are now, from the last one where it can."""
        rows = self._ledger.rows
        if seqs == self._seqs and not self._is_changing:
            if self._epoch == rows.epoch:
                return
            changed = rows.version[self._rows] != self._versions
            if changed.any():
                self._check([seqs[number] for number in np.flatnonzero(changed).tolist()])
                self._table.replace(self._rows, changed)
        else:
            rows_of_seqs = self._rows_of(seqs)
            self._is_changing = True
            self._seqs, self._rows = list(seqs), rows_of_seqs
            self._decode_indptr = torch.arange(len(seqs) + 1, dtype=torch.int32, device=self._ledger.device)
            self._table.replace(self._rows, None)
        self._versions = rows.version[self._rows]
        self._epoch = rows.epoch
        self._read()
        self._is_changing = False

    def _read(self) -> None:
        """Reads again what is kept besides the table."""
        books, table, page_size = self._ledger.rows, self._table, self._ledger.page_size
        self._lengths = books.num_tokens[self._rows].astype(np.int32)
        # Both mean nothing where the last page is full: the next token then begins a page.
        self._room = (-self._lengths) % np.int32(page_size)
        self._next_slots = (table.last_pages + 1) * page_size - self._room
        self._may_copy = bool(table.locked_tails.any())
        self._has_new = bool(books.is_new[self._rows].any())

    def _num_new_pages(self, num_tokens: int | Counts) -> npt.NDArray[Any]:
        """Pages that each sequence needs; for one token each, which begin a page."""
        if isinstance(num_tokens, int) and num_tokens == 1:
            begins: npt.NDArray[np.bool_] = self._room == 0
            return begins
        page_size = self._ledger.page_size
        needed: Counts = np.maximum((num_tokens - self._room + (page_size - 1)) // page_size, 0)
        return needed

    def _num_kept_free(self, num_new: npt.NDArray[Any]) -> int:
        ledger = self._ledger
        if not ledger.num_kept_free or not self._has_new:
            return 0
        takes_first = ledger.rows.is_new[self._rows] & (num_new > 0)
        return ledger.num_kept_free if takes_first.any() else 0

    def _to_copy(self) -> list[int]:
        """The sequences whose partly filled last page others have too; of those that share one, all but the last."""
        ledger, table = self._ledger, self._table
        candidates = table.locked_tails | (ledger.allocator.owner_counts_of(table.last_pages) > 1)
        copied = []
        num_left: dict[int, int] = {}
        for number in np.flatnonzero(candidates & (self._room > 0)).tolist():
            if table.locked_tails[number]:
                copied.append(number)
                continue
            page = int(table.last_pages[number])
            owners = num_left.get(page, ledger.allocator.num_owners(page) - ledger.copy_sources.get(page, 0))
            num_left[page] = owners - 1
            if owners > 1:
                copied.append(number)
        return copied

    def _copy_on_write(self, numbers: list[int], pages: PageArray) -> None:
        """Replaces the last pages of some sequences by copies, made in one call; frees `pages` when that fails."""
        copies = pages[: len(numbers)]
        try:
            self._ledger.copy_pages(list(zip(self._table.last_pages[numbers].tolist(), copies.tolist(), strict=True)))
        except BaseException:
            self._ledger.allocator.free(pages)
            raise
        for number, page in zip(numbers, copies, strict=True):
            self._seqs[number]._replace_last_page(page[None])
        chosen = np.array(numbers)
        self._table.replace_last(chosen, copies)
        self._read()

    def _batch(self, num_tokens: int | Counts, grown: Counts) -> StepBatch:
        """Counts the tokens, whose pages the table has; `next_slots` of grown rows are where their new pages begin."""
        page_size, device = self._ledger.page_size, self._ledger.device
        if isinstance(num_tokens, int) and num_tokens == 1:
            slots = self._next_slots.copy()
            self._room[grown] = page_size
            self._room -= 1
            self._next_slots += 1
            self._lengths = self._lengths + 1
            query_indptr = self._decode_indptr
        else:
            starts = self._lengths
            self._lengths = (starts + num_tokens).astype(np.int32)
            slots, query_indptr = self._packed(starts, num_tokens)
        books, table = self._ledger.rows, self._table
        books.num_tokens[self._rows] = self._lengths
        if self._has_new:
            books.is_new[self._rows] = self._has_new = False
        if query_indptr is not self._decode_indptr:
            self._read()
        last, max_page = page_size - self._room, self._ledger.allocator.num_pages - 1
        csr = BookedTable(table.indptr, table.indices[:-1], last, self._lengths, page_size, max_page, device)
        slot_mapping = torch.from_numpy(slots)
        if not self._ledger.is_on_cpu:
            slot_mapping = slot_mapping.to(device)
        return StepBatch(slot_mapping, query_indptr, csr, self, table.version)

    def _packed(self, starts: npt.NDArray[np.int32], num_tokens: int | Counts) -> tuple[Counts, torch.Tensor]:
        """Slots of tokens [starts[i], lengths[i]) of each sequence, and where each begins among them."""
        page_size, heap = self._ledger.page_size, self._ledger.rows.pages
        counts = np.broadcast_to(np.int64(num_tokens), starts.shape)
        stops = np.cumsum(counts)
        positions = np.repeat(self._lengths - stops, counts)
        positions += np.arange(positions.shape[0])
        pages = heap.flat[np.repeat(heap.start[self._rows], counts) + positions // page_size]
        slots = pages * np.int64(page_size) + positions % page_size
        indptr = np.zeros(counts.shape[0] + 1, np.int32)
        indptr[1:] = stops
        return slots, torch.from_numpy(indptr).to(self._ledger.device)
