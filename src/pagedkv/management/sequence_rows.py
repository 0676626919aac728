"""What a manager knows of its live sequences, in arrays with one entry a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .row_heap import RowHeap

__all__ = ["SequenceRows"]

_INT32_MAX = 2**31 - 1


class SequenceRows:
    """The state of all live sequences by row, so that a step over many of them is a few numpy calls.

    pages:       page ids in order of position, int32; -1 where a window has given the page back.
    tokens:      ids of the committed tokens, int32; int64 once an id does not fit.
    num_tokens:  tokens with a slot. lock_tokens: tokens under the lock of the prefix cache.
    published:   tokens offered to the prefix cache. first_page: pages given back behind a window.
    window:      tokens that one sees, 0 for all.
    is_new:      no slot was reserved yet.
    version:     a number that no other state of any sequence has, changed by all that changes which pages a sequence
                 names or may write, except `StepPlanner`, which knows what it changed.
    epoch:       the last version given.
    """

    def __init__(self) -> None:
        self.pages = RowHeap(0, np.int32)
        self.tokens = RowHeap(0, np.int32)
        self.num_tokens = np.zeros(0, np.int64)
        self.lock_tokens = np.zeros(0, np.int64)
        self.published = np.zeros(0, np.int64)
        self.first_page = np.zeros(0, np.int64)
        self.window = np.zeros(0, np.int64)
        self.version = np.zeros(0, np.int64)
        self.is_new = np.zeros(0, np.bool_)
        self.epoch = 0
        self._free_rows: list[int] = []

    def add(
        self,
        tokens: npt.NDArray[Any],
        pages: npt.NDArray[np.int32],
        num_expected: int = 0,
        num_expected_pages: int = 0,
    ) -> int:
        """A row for a sequence that begins with these, with room for as many as are expected; other state is zero."""
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        self.num_tokens[row] = self.lock_tokens[row] = self.published[row] = 0
        self.first_page[row] = self.window[row] = 0
        self.is_new[row] = True
        self._make_fit(tokens)
        self.tokens.extend(row, tokens, num_expected)
        self.pages.extend(row, pages, num_expected_pages)
        self.changed(row)
        return row

    def remove(self, row: int) -> None:
        """Forgets a row; its number is used again."""
        # Empty before it is offered, so that an interrupt leaves a row that nobody uses, and none that two have.
        self.pages.clear(row)
        self.tokens.clear(row)
        self.changed(row)
        self._free_rows.append(row)

    def changed(self, row: int) -> None:
        """Gives the row a version of its own."""
        self.epoch += 1
        self.version[row] = self.epoch

    def put_tokens(self, row: int, at: int, ids: npt.NDArray[Any]) -> None:
        """Writes token ids at entry `at`; the row's size stays."""
        self._make_fit(ids)
        self.tokens.put(row, at, ids)

    def append_token_each(self, rows: npt.NDArray[np.int64], ids: npt.NDArray[Any]) -> None:
        """Appends ids[i] to row rows[i]."""
        self._make_fit(ids)
        self.tokens.append_each(rows, ids)

    def _make_fit(self, ids: npt.NDArray[Any]) -> None:
        heap = self.tokens
        if ids.itemsize > heap.flat.itemsize and ids.size and int(ids.max()) > _INT32_MAX:
            heap.flat = heap.flat.astype(np.int64)

    def _grow(self) -> None:
        old = self.version.shape[0]
        num_rows = max(16, 2 * old)
        self.pages.add_rows(num_rows - self.pages.num_rows)
        self.tokens.add_rows(num_rows - self.tokens.num_rows)
        # The version last, from which an interrupted call begins again.
        for name in ("num_tokens", "lock_tokens", "published", "first_page", "window", "is_new", "version"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros(num_rows - array.shape[0], array.dtype)]))
        self._free_rows.extend(range(num_rows - 1, old - 1, -1))
