"""Memory for batches that are handed out: what the caller has dropped is handed out again."""

from __future__ import annotations

import math
import sys

import torch

from ...kernels.cpu.huge_pages import advise_huge_pages

__all__ = ["BatchMemory"]

# A small batch costs less to allocate than to look after, and a large one is not worth holding on to.
_LEAST_BYTES, _MOST_BYTES = 1 << 20, 256 << 20


class BatchMemory:
    """Empty tensors that nobody else sees, the memory of the last one reused when nothing refers to it any more.

    New memory of some megabytes comes in pages that the system clears at first touch, which takes longer than the copy
    of the tiles: 4,096 tiles of 8 KiB are read in a half to a fifth of the time.
    """

    def __init__(self) -> None:
        self._last: torch.UntypedStorage | None = None
        alone = torch.empty(1, device="cpu").untyped_storage()
        # How many these are when a local variable alone refers to it: it depends on the version of Python.
        self._own_references = _num_references(alone)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory with any content, the caller's own for as long as he refers to it."""
        num_bytes = math.prod(shape) * dtype.itemsize
        # Taken out first: a second thread that asks meanwhile finds none.
        last, self._last = self._last, None
        if last is not None and last.nbytes() == num_bytes and _num_references(last) == self._own_references:
            values: torch.Tensor = torch.empty(0, dtype=dtype, device="cpu").set_(last).view(shape)
        else:
            values = torch.empty(shape, dtype=dtype, device="cpu")
            advise_huge_pages(values)
        if _LEAST_BYTES <= num_bytes <= _MOST_BYTES:
            self._last = values.untyped_storage()
        return values


def _num_references(storage: torch.UntypedStorage) -> tuple[int, int]:
    """Tensors that use the memory, itself included; references that Python has to it, those of the call included."""
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)
