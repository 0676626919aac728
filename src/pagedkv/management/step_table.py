"""The page table of the sequences of a step, kept from one step to the next."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from .allocator import PageArray
from .sequence_rows import SequenceRows

__all__ = ["StepTable"]

Counts = npt.NDArray[np.int64]


class StepTable:
    """CSR and dense form over some rows of the books.

    num_pages: [S] pages of each row. last_pages: [S] its last page, -1 for none.
    locked_tails: [S] whether a row ends inside a page that is under its lock of the prefix cache.
    indptr, indices: the CSR form, with one entry more at the end of indices. Made anew by each change and never written
            to afterwards, so that tables that were handed out stay as they are.
    The dense form is one buffer in which only changed entries are written; it exists once it was asked for.
    version: differs after every change.
    """

    def __init__(self, books: SequenceRows, page_size: int) -> None:
        self._books = books
        self._page_size = page_size
        self._dense: npt.NDArray[np.int32] | None = None
        self.version = 0
        self.indices = np.zeros(1, np.int32)
        self.replace(np.empty(0, np.int64), None)

    def replace(self, rows: Counts, changed: npt.NDArray[np.bool_] | None) -> None:
        """Reads the pages of the changed rows again. None: of all, and they may be other rows than before."""
        books = self._books
        self.num_pages = books.pages.size[rows].astype(np.int32)
        last = books.pages.start[rows] + self.num_pages - 1
        self.last_pages = np.full(rows.shape[0], -1, np.int64)
        has_pages = self.num_pages > 0
        self.last_pages[has_pages] = books.pages.flat[last[has_pages]]
        is_partial = books.num_tokens[rows] % self._page_size != 0
        self.locked_tails = is_partial & (books.lock_tokens[rows] > (self.num_pages - 1) * self._page_size)
        if changed is None:
            self._dense = None
            flat, starts = books.pages.flat, books.pages.start[rows]
            spans = zip(starts.tolist(), (starts + self.num_pages).tolist(), strict=True)
            self.indices = np.concatenate([*(flat[start:stop] for start, stop in spans), np.zeros(1, np.int32)])
            np.maximum(self.indices, 0, out=self.indices)
        else:
            numbers = np.flatnonzero(changed).tolist()
            starts = self.indptr.tolist()
            self._join((starts[number], starts[number + 1], self._row(int(rows[number]))) for number in numbers)
            self._put_rows(rows, numbers)
        self._count()

    def grow(self, rows: Counts, grown: Counts, counts: Counts | None, pages: PageArray) -> None:
        """Appends the next counts[i] of `pages` to row rows[grown[i]], one for None, in the books too."""
        ends, old = self.indptr[1:][grown], self.num_pages[grown]
        if counts is None:
            self._books.pages.append_each(rows[grown], pages)
            self.last_pages[grown] = pages
            self._insert(ends, pages)
        else:
            self._books.pages.extend_each(rows[grown], counts, pages)
            stops = np.cumsum(counts)
            self.last_pages[grown] = pages[stops - 1]
            between = ends.tolist()
            self._join(zip(between, between, np.split(pages, stops[:-1]), strict=True))
        self.num_pages[grown] = old + (1 if counts is None else counts)
        if self._dense is not None:
            self._grow_dense(grown, np.ones(grown.shape[0], np.int64) if counts is None else counts, old, pages)
        self._count()

    def _grow_dense(self, grown: Counts, counts: Counts, old: npt.NDArray[np.int32], pages: PageArray) -> None:
        self._widen(int(self.num_pages.max()))
        numbers = np.repeat(np.arange(grown.shape[0]), counts)
        columns = old[numbers] + np.arange(pages.shape[0]) - (np.cumsum(counts) - counts)[numbers]
        if self._dense is not None:
            self._dense[grown[numbers], columns] = pages

    def replace_last(self, numbers: Counts, pages: PageArray) -> None:
        """Notes other last pages for rows `numbers`; the books have them already."""
        self.indices = self.indices.copy()
        self.indices[self.indptr[numbers + 1] - 1] = pages
        self.last_pages[numbers] = pages
        self.locked_tails[numbers] = False
        if self._dense is not None:
            self._dense[numbers, self.num_pages[numbers] - 1] = pages
        self.version += 1

    def dense(self, rows: Counts) -> torch.Tensor:
        """The dense form [S, M] int32 of `rows`, which are those of the table; a view of the buffer."""
        longest = int(self.num_pages.max(initial=0))
        if self._dense is None:
            self._dense = np.full((rows.shape[0], longest + 8), -1, np.int32)
            self._put_rows(rows, list(range(rows.shape[0])))
        return torch.from_numpy(self._dense[:, :longest])

    def _row(self, row: int) -> PageArray:
        """The pages of a row, 0 in place of those that a window has given back."""
        pages = self._books.pages.view(row)
        return np.maximum(pages, 0) if self._books.first_page.item(row) else pages

    def _join(self, parts: Iterable[tuple[int, int, PageArray]]) -> None:
        """Replaces the entries [start, stop) by other pages for each part, in order, in a new array."""
        joined, done, old = [], 0, self.indices
        for start, stop, pages in parts:
            joined.append(old[done:start])
            joined.append(pages)
            done = stop
        joined.append(old[done:])
        self.indices = np.concatenate(joined)

    def _insert(self, ends: npt.NDArray[np.int32], pages: PageArray) -> None:
        """Puts pages[i] before entry ends[i], in a new array."""
        old, done, joined = self.indices, 0, []
        for end in ends.tolist():
            # With one entry more than belongs there, which keeps the place of the new one.
            joined.append(old[done : end + 1])
            done = end
        joined.append(old[done:])
        self.indices = np.concatenate(joined)
        self.indices[ends + np.arange(ends.shape[0])] = pages

    def _count(self) -> None:
        self.indptr = np.empty(self.num_pages.shape[0] + 1, np.int32)
        self.indptr[0] = 0
        self.num_pages.cumsum(dtype=np.int32, out=self.indptr[1:])
        self.version += 1

    def _put_rows(self, rows: Counts, numbers: list[int]) -> None:
        if self._dense is None:
            return
        self._widen(int(self.num_pages.max(initial=0)))
        for number in numbers:
            pages = self._books.pages.view(int(rows[number]))
            self._dense[number, : pages.shape[0]] = pages
            self._dense[number, pages.shape[0] :] = -1

    def _widen(self, num_columns: int) -> None:
        if self._dense is not None and num_columns > self._dense.shape[1]:
            wider = np.full((self._dense.shape[0], num_columns + num_columns // 8 + 8), -1, np.int32)
            wider[:, : self._dense.shape[1]] = self._dense
            self._dense = wider
