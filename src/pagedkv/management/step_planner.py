"""Reserves slots for many sequences at once, and keeps the page table from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..kernels.upload import uploaded
from .allocator import PageArray
from .ledger import PageLedger
from .row_heap import RowSnapshot
from .sequence import Sequence
from .step_batch import BookedTable, StepBatch
from .step_commit import check_commit, commit
from .step_table import StepTable

__all__ = ["StepPlanner"]

Counts = npt.NDArray[np.int64]


class StepPlanner:
    """One manager's: the rows of the sequences of the last step, and the table over them.

    Cost: numpy calls over the sequences, nothing a token and nothing a page that was there before. Python steps are a
          sequence only for sequences that joined or were changed otherwise (append, truncate, fork, a copy on write),
          for a page that is copied, and for a CSR form that is asked for.
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
        self._max_page = ledger.allocator.num_pages - 1
        self._device = ledger.budget.device
        self._decode_starts = np.zeros(1, np.int32)
        self._decode_indptr = uploaded(self._decode_starts, self._device)
        self._read()

    def fits(self, seqs: list[Sequence], num_tokens: int | Counts) -> bool:
        """True when `reserve` with the same arguments would find its pages."""
        return self._ledger.budget.can_obtain(*self.needs(seqs, num_tokens))

    def needs(self, seqs: list[Sequence], num_tokens: int | Counts) -> tuple[int, int]:
        """How many pages `reserve` with the same arguments would take, and how many it would have to leave."""
        self._follow(seqs)
        num_new = self._num_new_pages(num_tokens)
        return int(num_new.sum()) + len(self._to_copy()), self._num_kept_free(num_new)

    def reserve(self, seqs: list[Sequence], num_tokens: int | Counts, obtained: PageArray | None = None) -> StepBatch:
        """Reserves for all sequences or, raising OutOfPagesError, for none.

        obtained: the pages to take, as many as `needs` said; they are free again when it raises.
        """
        self._follow(seqs)
        num_new = self._num_new_pages(num_tokens)
        grown = num_new.nonzero()[0]
        copied = self._to_copy() if self._may_copy or self._ledger.allocator.num_extra_owners else []
        if len(grown) or copied:
            counts = None if num_new.dtype == np.bool_ else num_new[grown]
            total = len(grown) if counts is None else int(counts.sum())
            pages = obtained
            if pages is None:
                pages = self._ledger.budget.obtain(total + len(copied), self._num_kept_free(num_new))
            self._is_changing = True
            if copied:
                self._copy_on_write(copied, pages)
                pages = pages[len(copied) :]
            if total:
                self._table.grow(self._rows, grown, counts, pages)
            if counts is None:
                self._next_slots[grown] = pages.astype(np.int64) * self._ledger.page_size
                self._room[grown] = self._ledger.page_size
        self._is_changing = True
        step = self._batch(num_tokens)
        self._is_changing = False
        return step

    def forget(self) -> None:
        """Drops what is kept of the last step, so that the next call reads all of it again: after an interrupt."""
        self._is_changing = True
        self._table.version += 1
        self._seqs = []

    def commit(self, seqs: list[Sequence], token_ids: npt.NDArray[Any]) -> None:
        """Names one reserved token of each sequence; see management/step_commit.py."""
        commit(self._ledger, seqs, self._rows_now(seqs), token_ids)

    def check_commit(self, seqs: list[Sequence], token_ids: npt.NDArray[Any]) -> None:
        """Refuses what `commit` with the same arguments would refuse."""
        check_commit(self._ledger, seqs, self._rows_now(seqs), token_ids)

    def _rows_now(self, seqs: list[Sequence]) -> Counts:
        return self._rows if self._is_last_step_of(seqs) else self._rows_of(seqs)

    def _is_last_step_of(self, seqs: list[Sequence]) -> bool:
        """True when `seqs` are those of the last step, all of them open and on pages still."""
        books = self._ledger.rows
        if self._is_changing or seqs != self._seqs:
            return False
        return self._epoch == books.epoch or not np.count_nonzero(books.version[self._rows] != self._versions)

    @property
    def table_version(self) -> int:
        """Differs after every change of the table."""
        return self._table.version

    def dense_table(self) -> torch.Tensor:
        """The dense form [S, M] int32 for the last step; see `StepBatch.dense_table`."""
        with self._ledger.budget.lock:
            if not self._table.has_dense and (self._ledger.rows.version[self._rows] != self._versions).any():
                raise ValueError(
                    "the dense table must be asked for before its sequences change, got one that did. Ask in the step "
                    "before, and it is kept."
                )
            dense = self._table.dense(self._rows)
            return dense if self._device.type == "cpu" else uploaded(dense.numpy(), self._device)

    def csr_table(self, snapshot: RowSnapshot, lengths: Counts) -> BookedTable:
        """The CSR form of the step that had this snapshot of the table and these lengths."""
        with self._ledger.budget.lock:
            indptr, indices = snapshot.read()
        seq_lens = lengths.astype(np.int32)
        return BookedTable(indptr, indices, seq_lens, self._ledger.page_size, self._max_page, self._device)

    def table_rows(self) -> Iterator[tuple[Sequence, PageArray]]:
        """The entries of the CSR form, of sequences that were not changed since the last step otherwise."""
        if self._is_changing:  # by a step that was interrupted
            return
        is_current = self._ledger.rows.version[self._rows] == self._versions
        indptr, indices = self._table.snapshot.read()
        for number in np.flatnonzero(is_current).tolist():
            start, stop = indptr[number : number + 2].tolist()
            yield self._seqs[number], indices[start:stop]

    def _rows_of(self, seqs: list[Sequence]) -> Counts:
        self._check(seqs)
        rows = [seq._row for seq in seqs]
        if len(set(rows)) != len(rows):
            raise ValueError("seqs must be different sequences, got one twice. Fork it first.")
        return np.array(rows, np.int64)

    def _follow(self, seqs: list[Sequence]) -> None:
        """Makes the table one of `seqs` as they are now, from the last one where it can."""
        rows = self._ledger.rows
        if seqs == self._seqs and not self._is_changing:
            if self._epoch == rows.epoch:
                return
            changed = rows.version[self._rows] != self._versions
            if not np.count_nonzero(changed):
                self._epoch = rows.epoch
                return
            self._check([seqs[number] for number in changed.nonzero()[0].tolist()])
            self._table.replace(self._rows, changed)
        else:
            rows_of_seqs = self._rows_of(seqs)
            self._is_changing = True
            self._seqs, self._rows = list(seqs), rows_of_seqs
            self._decode_starts = np.arange(len(seqs) + 1, dtype=np.int32)
            self._decode_indptr = uploaded(self._decode_starts, self._device)
            self._table.replace(self._rows, None)
        self._versions = rows.version[self._rows]
        self._epoch = rows.epoch
        self._read()
        self._is_changing = False

    def _read(self) -> None:
        """Reads again what is kept besides the table."""
        books, table, page_size = self._ledger.rows, self._table, self._ledger.page_size
        self._lengths = books.num_tokens[self._rows]
        # Both mean nothing where the last page is full: the next token then begins a page.
        self._room = -self._lengths % page_size
        self._next_slots = (table.last_pages.astype(np.int64) + 1) * page_size - self._room
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
        if not self._has_new or not ledger.budget.num_kept_free:
            return 0
        takes_first = ledger.rows.is_new[self._rows] & (num_new > 0)
        return ledger.budget.num_kept_free if takes_first.any() else 0

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
            owners = num_left.get(page, ledger.allocator.num_owners(page) - ledger.budget.copy_sources.get(page, 0))
            num_left[page] = owners - 1
            if owners > 1:
                copied.append(number)
        return copied

    def _copy_on_write(self, numbers: list[int], pages: PageArray) -> None:
        """Replaces the last pages of some sequences by copies, made in one call; frees `pages` when that fails."""
        copies = pages[: len(numbers)]
        try:
            self._ledger.budget.copy_pages(
                list(zip(self._table.last_pages[numbers].tolist(), copies.tolist(), strict=True))
            )
        except BaseException:
            self._ledger.allocator.free(pages)
            raise
        for number, page in zip(numbers, copies, strict=True):
            self._seqs[number]._replace_last_page(page[None])
        self._table.replace_last(self._rows, np.array(numbers), copies)
        self._read()

    def _batch(self, num_tokens: int | Counts) -> StepBatch:
        """Counts the tokens, whose pages the table has."""
        books = self._ledger.rows
        is_decode = isinstance(num_tokens, int) and num_tokens == 1
        starts = self._lengths
        self._lengths = starts + num_tokens
        books.num_tokens[self._rows] = self._lengths
        if self._has_new:
            books.is_new[self._rows] = self._has_new = False
        if is_decode:
            slots, starts_of_rows, query_indptr = self._next_slots.copy(), self._decode_starts, self._decode_indptr
            self._next_slots += 1
            self._room -= 1
        else:
            slots, starts_of_rows = self._packed(starts, num_tokens)
            query_indptr = uploaded(starts_of_rows, self._device)
            self._read()
        slot_mapping = uploaded(slots, self._device)
        on_host = None if self._device.type == "cpu" else starts_of_rows
        return StepBatch(slot_mapping, query_indptr, self, self._table.snapshot, self._lengths, on_host)

    def _packed(self, starts: Counts, num_tokens: int | Counts) -> tuple[Counts, npt.NDArray[np.int32]]:
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
        return slots, indptr
