"""Rows of different lengths in one buffer, so that one numpy call reads or writes many of them."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.gather_rows import gather_rows

__all__ = ["RowHeap", "RowSnapshot"]

_SMALLEST_CHUNK = 16
# A snapshot is read as a whole when it would keep more than one row in so many: in the end that is less work.
_MOST_KEPT = 16

_Csr = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


class RowHeap:
    """Row i is flat[start[i] : start[i] + size[i]], in a chunk of the buffer whose length is a power of two.

    Owns: the buffer; what is passed in is copied. Views are valid until the next call that lengthens a row.
    Cost: one copy of what is added; a row that outgrows its chunk moves to one twice as long. At most four times the
          memory of what the rows held together at their longest.
    Interrupts: a KeyboardInterrupt that ends a call leaves each row as it was before or as it is after, and at worst a
          chunk that nobody uses again.
    """

    # The order of writes is what an interrupt may not break: entries before the size that counts them; a chunk is taken
    # from the row, or from the free ones, before it is given to anybody; and a row's capacity is never more than what
    # is behind its start, so it shrinks before the row moves and grows after it.

    def __init__(self, num_rows: int, dtype: npt.DTypeLike) -> None:
        self.flat: npt.NDArray[Any] = np.empty(0, dtype)
        self.start = np.zeros(num_rows, np.int64)
        self.size = np.zeros(num_rows, np.int64)
        self._capacity = np.zeros(num_rows, np.int64)
        self._end = 0
        self._free_chunks: dict[int, list[int]] = {}
        self._snapshots: set[weakref.ref[RowSnapshot]] = set()

    @property
    def num_rows(self) -> int:
        """Rows, the empty ones included."""
        return self.size.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer, spare room included."""
        return self.flat.nbytes

    def add_rows(self, num_rows: int) -> None:
        """Adds `num_rows` empty rows."""
        wanted = self.num_rows + num_rows
        self.start, self._capacity, self.size = (
            np.concatenate([array, np.zeros(max(0, wanted - array.shape[0]), np.int64)])
            for array in (self.start, self._capacity, self.size)
        )

    def view(self, row: int, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Entries [start, stop) of a row without a copy."""
        base = self.start.item(row)
        return self.flat[base + start : base + (self.size.item(row) if stop is None else stop)]

    def snapshot(self, rows: npt.NDArray[np.int64], sizes: npt.NDArray[np.int32]) -> RowSnapshot:
        """The rows `rows`, of int32, as they are now, to be read later; `sizes` are theirs. Neither is written to any
        more.
        """
        made = RowSnapshot(self, rows, sizes)
        self._snapshots.add(weakref.ref(made, self._snapshots.discard))
        return made

    def extend(self, row: int, values: npt.NDArray[Any], num_expected: int = 0) -> None:
        """Appends `values` to a row, and makes room for one of `num_expected` entries."""
        size = self.size.item(row)
        needed = size + len(values)
        room = needed if needed > num_expected else num_expected
        if room > self._capacity.item(row):
            self._move(row, room)
        base = self.start.item(row)
        self.flat[base + size : base + needed] = values
        self.size[row] = needed

    def put(self, row: int, at: int, values: npt.NDArray[Any]) -> None:
        """Writes `values` at entry `at` of a row, at most its size; entries beyond the size do not count yet."""
        if self._snapshots:
            self._keep(row, at)
        needed = at + len(values)
        if needed > self._capacity.item(row):
            self._move(row, needed)
        base = self.start.item(row)
        self.flat[base + at : base + needed] = values

    def truncate(self, row: int, size: int) -> None:
        """Keeps the first `size` entries of a row."""
        if self._snapshots:
            self._keep(row, size)
        self.size[row] = size
        if 4 * size + _SMALLEST_CHUNK < self._capacity.item(row):
            self._move(row, size)

    def clear(self, row: int) -> None:
        """Empties a row and takes its chunk back."""
        if self._snapshots:
            self._keep(row, 0)
        capacity = self._capacity.item(row)
        self.size[row] = 0
        if capacity:
            self._capacity[row] = 0
            self._offer(self.start.item(row), capacity)

    def append_each(self, rows: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> None:
        """Appends values[i] to row rows[i]; each row is named once."""
        size = self.size[rows]
        is_full = size == self._capacity[rows]
        if np.count_nonzero(is_full):
            for row in rows[is_full].tolist():
                self._move(row, self.size.item(row) + 1)
        places = self.start[rows]
        places += size
        # Two steps: an assignment that converts as it scatters takes three times as long.
        self.flat[places] = values.astype(self.flat.dtype, copy=False)
        size += 1
        self.size[rows] = size

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
        """Gives a row a chunk for `needed` entries, all that count of its own kept."""
        size, old, old_capacity = self.size.item(row), self.start.item(row), self._capacity.item(row)
        capacity = max(_SMALLEST_CHUNK, 1 << (needed - 1).bit_length())
        start = self._chunk(capacity)
        if size:
            self.flat[start : start + size] = self.flat[old : old + size]
        if capacity < old_capacity:
            self._capacity[row] = capacity
        self.start[row] = start
        self._capacity[row] = capacity
        if old_capacity:
            self._offer(old, old_capacity)

    def _keep(self, row: int, start: int) -> None:
        """Entries of a row from `start` on are about to change: lets the snapshots that have them save it."""
        if start < self.size.item(row):
            for reference in tuple(self._snapshots):
                snapshot = reference()
                if snapshot is not None:
                    snapshot._keep(row, start)

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

    def _offer(self, start: int, capacity: int) -> None:
        chunks = self._free_chunks.get(capacity)
        if chunks is None:
            self._free_chunks[capacity] = [start]
        else:
            chunks.append(start)


class RowSnapshot:
    """Some rows as they were when it was made, read when they are asked for; if nobody asks, next to nothing is done.

    Owns: copies of rows that were about to change otherwise than by lengthening; the others are read where they lie.
    sizes: of the rows, int32.
    """

    __slots__ = ("__weakref__", "_csr", "_heap", "_kept", "_rows", "sizes")

    def __init__(self, heap: RowHeap, rows: npt.NDArray[np.int64], sizes: npt.NDArray[np.int32]) -> None:
        self._heap = heap
        self._rows = rows
        self.sizes = sizes
        self._kept: dict[int, npt.NDArray[np.int32]] = {}
        self._csr: _Csr | None = None

    def read(self) -> _Csr:
        """Where each row begins, and the rows one behind the other, with 0 for entries below 0: the same two arrays in
        each call.
        """
        csr = self._csr
        if csr is None:
            indptr = np.empty(self.sizes.shape[0] + 1, np.int32)
            indptr[0] = 0
            np.add.accumulate(self.sizes, out=indptr[1:])
            values = self._values(indptr)
            csr = self._csr = indptr, values
            self._heap._snapshots.discard(weakref.ref(self))
            self._kept = {}
        return csr

    def _values(self, indptr: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        starts = self._heap.start[self._rows]
        for number in self._kept:
            starts[number] = 0  # anywhere: what lies there is replaced
        values = gather_rows(self._heap.flat, starts, indptr)
        for number, kept in self._kept.items():
            np.maximum(kept, 0, out=values[indptr.item(number) : indptr.item(number + 1)])
        return values

    def _keep(self, row: int, start: int) -> None:
        for number in (self._rows == row).nonzero()[0].tolist():
            size = self.sizes.item(number)
            if number in self._kept or start >= size:
                continue
            if _MOST_KEPT * len(self._kept) >= self._rows.shape[0]:
                self.read()
                return
            self._kept[number] = self._heap.view(row, 0, size).copy()
