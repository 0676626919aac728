"""Rows of different lengths in one buffer, so that one numpy call reads or writes many of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["RowHeap"]

_SMALLEST_CHUNK = 16


class RowHeap:
    """Row i is flat[start[i] : start[i] + size[i]], in a chunk of the buffer whose length is a power of two.

    Owns: the buffer; what is passed in is copied. Views are valid until the next call that lengthens a row.
    Cost: one copy of what is added; a row that outgrows its chunk moves to one twice as long. At most four times the
          memory of what the rows held together at their longest.
    """

    def __init__(self, num_rows: int, dtype: npt.DTypeLike) -> None:
        self.flat: npt.NDArray[Any] = np.empty(0, dtype)
        self.start = np.zeros(num_rows, np.int64)
        self.size = np.zeros(num_rows, np.int64)
        self._capacity = np.zeros(num_rows, np.int64)
        self._end = 0
        self._free_chunks: dict[int, list[int]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer, spare room included."""
        return self.flat.nbytes

    def add_rows(self, num_rows: int) -> None:
        """Adds `num_rows` empty rows."""
        self.start, self.size, self._capacity = (
            np.concatenate([array, np.zeros(num_rows, np.int64)]) for array in (self.start, self.size, self._capacity)
        )

    def view(self, row: int, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Entries [start, stop) of a row without a copy."""
        base = self.start.item(row)
        return self.flat[base + start : base + (self.size.item(row) if stop is None else stop)]

    def extend(self, row: int, values: npt.NDArray[Any]) -> None:
        """Appends `values` to a row."""
        size = self.size.item(row)
        self.put(row, size, values)
        self.size[row] = size + values.shape[0]

    def put(self, row: int, at: int, values: npt.NDArray[Any]) -> None:
        """Writes `values` at entry `at` of a row, at most its size; entries beyond the size do not count yet."""
        needed = at + values.shape[0]
        if needed > self._capacity.item(row):
            self._move(row, needed)
        base = self.start.item(row)
        self.flat[base + at : base + needed] = values

    def reserve(self, row: int, num_entries: int) -> None:
        """Makes room for a row of `num_entries`."""
        if num_entries > self._capacity.item(row):
            self._move(row, num_entries)

    def truncate(self, row: int, size: int) -> None:
        """Keeps the first `size` entries of a row."""
        self.size[row] = size
        if 4 * size + _SMALLEST_CHUNK < self._capacity.item(row):
            self._move(row, size)

    def clear(self, row: int) -> None:
        """Empties a row and takes its chunk back."""
        capacity = self._capacity.item(row)
        if capacity:
            self._free_chunks.setdefault(capacity, []).append(self.start.item(row))
            self._capacity[row] = 0
        self.size[row] = 0

    def append_each(self, rows: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> None:
        """Appends values[i] to row rows[i]; each row is named once."""
        size = self.size[rows]
        is_full = size == self._capacity[rows]
        if is_full.any():
            for row in rows[is_full].tolist():
                self._move(row, self.size.item(row) + 1)
        self.flat[self.start[rows] + size] = values
        self.size[rows] = size + 1

    def extend_each(self, rows: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> None:
        """Appends the next counts[i] of `values` to row rows[i]; each row is named once."""
        needed = self.size[rows] + counts
        for number in np.flatnonzero(needed > self._capacity[rows]).tolist():
            self._move(int(rows[number]), int(needed[number]))
        stops = np.cumsum(counts)
        ends = self.start[rows] + needed - stops
        self.flat[np.repeat(ends, counts) + np.arange(values.shape[0])] = values
        self.size[rows] = needed

    def _move(self, row: int, needed: int) -> None:
        """Gives a row a chunk for `needed` entries, its first ones kept."""
        size = min(self.size.item(row), needed)
        capacity = max(_SMALLEST_CHUNK, 1 << (needed - 1).bit_length())
        start = self._chunk(capacity)
        if size:
            old = self.start.item(row)
            self.flat[start : start + size] = self.flat[old : old + size]
        self.clear(row)
        self.start[row], self.size[row], self._capacity[row] = start, size, capacity

    def _chunk(self, capacity: int) -> int:
        chunks = self._free_chunks.get(capacity)
        if chunks:
            return chunks.pop()
        start = self._end
        if start + capacity > self.flat.shape[0]:
            grown = np.empty(max(start + capacity, 2 * self.flat.shape[0]), self.flat.dtype)
            grown[:start] = self.flat[:start]
            self.flat = grown
        self._end = start + capacity
        return start
