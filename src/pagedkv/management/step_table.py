"""The page table of the sequences of a step, kept from one step to the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .allocator import PageArray
from .row_heap import RowSnapshot
from .sequence_rows import SequenceRows

__all__ = ["StepTable"]

Counts = npt.NDArray[np.int64]


class StepTable:
    """CSR and dense form over some rows of the books.

    num_pages: [S] pages of each row, made anew by each change. last_pages: [S] its last page, -1 for none.
    locked_tails: [S] whether a row ends inside a page that is under its lock of the prefix cache.
    snapshot: the CSR form, with 0 for pages that a window gave back. It is put together only when somebody asks for it,
            and is then what the table is now, whatever happens to the rows until then.
    The dense form is one buffer in which only changed entries are written; it exists once it was asked for.
    version: differs after every change.
    """

    snapshot: RowSnapshot

    def __init__(self, books: SequenceRows, page_size: int) -> None:
        self._books = books
        self._page_size = page_size
        self._dense: npt.NDArray[np.int32] | None = None
        self._longest = 0
        self.version = 0
        self.replace(np.empty(0, np.int64), None)

    def replace(self, rows: Counts, changed: npt.NDArray[np.bool_] | None) -> None:
        """Reads the pages of the changed rows again. None: of all, and they may be other rows than before."""
        books = self._books
        sizes = books.pages.size[rows]
        self.num_pages = sizes.astype(np.int32)
        has_pages = sizes > 0
        last = books.pages.start[rows] + sizes - 1
        self.last_pages = np.full(rows.shape[0], -1, np.int32)
        self.last_pages[has_pages] = books.pages.flat[last[has_pages]]
        is_partial = books.num_tokens[rows] % self._page_size != 0
        self.locked_tails = is_partial & (books.lock_tokens[rows] > (sizes - 1) * self._page_size)
        if changed is None:
            self._dense = None
        elif self._dense is not None:
            self._longest = int(self.num_pages.max(initial=0))
            self._put_rows(self._widen(self._dense), rows, changed.nonzero()[0].tolist())
        self._take_snapshot(rows)
        self.version += 1

    def grow(self, rows: Counts, grown: Counts, counts: Counts | None, pages: PageArray) -> None:
        """Appends the next counts[i] of `pages` to row rows[grown[i]], one for None, in the books too."""
        old = self.num_pages[grown]
        columns: npt.NDArray[Any]
        if counts is None:
            new = old + 1
            self._books.pages.append_each(rows[grown], pages)
            self.last_pages[grown] = pages
            numbers, columns = grown, old.astype(np.int64)
        else:
            new = (old + counts).astype(np.int32)
            self._books.pages.extend_each(rows[grown], counts, pages)
            stops = counts.cumsum()
            self.last_pages[grown] = pages[stops - 1]
            numbers = np.repeat(grown, counts)
            columns = np.repeat(new - stops, counts) + np.arange(pages.shape[0])
        self.num_pages = self.num_pages.copy()
        self.num_pages[grown] = new
        self._take_snapshot(rows)
        if self._dense is not None:
            self._longest = max(self._longest, int(new.max()))
            self._widen(self._dense)[numbers, columns] = pages
        self.version += 1

    def replace_last(self, rows: Counts, numbers: Counts, pages: PageArray) -> None:
        """Notes other last pages for rows[numbers]; the books have them already."""
        self.last_pages[numbers] = pages
        self.locked_tails[numbers] = False
        if self._dense is not None:
            self._dense[numbers, self.num_pages[numbers] - 1] = pages
        self._take_snapshot(rows)
        self.version += 1

    @property
    def has_dense(self) -> bool:
        """True once the dense form was asked for, from when on it is kept."""
        return self._dense is not None

    def dense(self, rows: Counts) -> torch.Tensor:
        """The dense form [S, M] int32 of `rows`, which are those of the table; a view of the buffer."""
        if self._dense is None:
            longest = self._longest = int(self.num_pages.max(initial=0))
            dense = np.full((rows.shape[0], longest + longest // 8 + 8), -1, np.int32)
            self._put_rows(dense, rows, list(range(rows.shape[0])))
            # Whole, or not at all: an interrupt may come at any time.
            self._dense = dense
        return torch.from_numpy(self._dense[:, : self._longest])

    def _take_snapshot(self, rows: Counts) -> None:
        self.snapshot = self._books.pages.snapshot(rows, self.num_pages)

    def _put_rows(self, dense: npt.NDArray[np.int32], rows: Counts, numbers: list[int]) -> None:
        for number in numbers:
            pages = self._books.pages.view(int(rows[number]))
            dense[number, : pages.shape[0]] = pages
            dense[number, pages.shape[0] :] = -1

    def _widen(self, dense: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The buffer of the dense form, which was `dense`, with room for the longest row."""
        num_columns = self._longest
        if num_columns > dense.shape[1]:
            wider = np.full((dense.shape[0], num_columns + num_columns // 8 + 8), -1, np.int32)
            wider[:, : dense.shape[1]] = dense
            self._dense = dense = wider
        return dense
