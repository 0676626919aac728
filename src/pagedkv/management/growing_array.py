"""A numpy array that grows at its end in amortised constant time and gives memory back when it shrinks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GrowingArray"]


class GrowingArray:
    """One-dimensional and of one dtype; at most four times the memory of what it holds, plus sixteen entries.

    Owns: its own buffer; what is passed in is copied. `view()` is a view, valid until the next extend or truncate.
    """

    __slots__ = ("_buffer", "size")

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._buffer = values.copy()
        self.size = int(values.shape[0])

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer, spare room included."""
        return self._buffer.nbytes

    def view(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Entries [start, stop) without a copy."""
        return self._buffer[start : self.size if stop is None else stop]

    def extend(self, values: npt.NDArray[Any]) -> None:
        """Appends `values`."""
        self.put(self.size, values)
        self.size += values.shape[0]

    def put(self, start: int, values: npt.NDArray[Any]) -> None:
        """Writes `values` at `start`, which is at most `size`; `size` stays, so entries beyond it are not there yet."""
        needed = start + values.shape[0]
        if needed > self._buffer.shape[0]:
            grown = np.empty(max(needed, 2 * self._buffer.shape[0]), self._buffer.dtype)
            grown[: self.size] = self._buffer[: self.size]
            self._buffer = grown
        self._buffer[start:needed] = values

    def truncate(self, size: int) -> None:
        """Keeps the first `size` entries."""
        self.size = size
        if 4 * size + 16 < self._buffer.shape[0]:
            self._buffer = self._buffer[:size].copy()
