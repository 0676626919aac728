"""Length of the common prefix of two token arrays: the inner step of every radix tree walk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .cpu import native

__all__ = ["common_prefix_len", "fast_compare_key"]

TokenIds = npt.NDArray[np.integer[Any]] | torch.Tensor

_INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))

# What the native core looks at itself, and how its binding says that it cannot: read-only, or of another device.
_ARRAYS = (np.ndarray, torch.Tensor)
_UNREADABLE = (BufferError, RuntimeError, TypeError, ValueError)


def fast_compare_key(a: TokenIds, b: TokenIds) -> int:
    """How many leading tokens of `a` and `b` are equal.

    Shapes: a [n], b [m], one-dimensional int32 or int64, both of one dtype, on the CPU; numpy arrays or torch tensors.
    Raises: TypeError, ValueError for anything else.

    >>> fast_compare_key(np.array([1, 2, 3, 4]), np.array([1, 2, 9]))
    2
    """
    if type(a) in _ARRAYS and type(b) in _ARRAYS:
        num_equal = _native_len(a, b)
        if num_equal >= 0:
            return num_equal
    left, right = _as_array("a", a), _as_array("b", b)
    if left.dtype != right.dtype:
        raise TypeError(f"b must have the dtype of a, {left.dtype}, got {right.dtype}.")
    return _len_in_blocks(left, right)


def common_prefix_len(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> int:
    """The same for arrays known to be right."""
    num_equal = _native_len(a, b)
    return num_equal if num_equal >= 0 else _len_in_blocks(a, b)


def _native_len(a: TokenIds, b: TokenIds) -> int:
    """What the native core finds, or -1 when it does not read these arrays or is not here.

    A call takes 0.6 us, mostly for the addresses of two arrays, and 8,192 equal int32 tokens 0.6 us more; in blocks of
    numpy it is 1.4 us, and 0.9 more (AMD EPYC).
    """
    try:
        return _native_function()(a, b)
    except _UNREADABLE:
        return -1


@functools.cache
def _native_function() -> Callable[[Any, Any], int]:
    if native.unavailable() is None:
        function: Callable[[Any, Any], int] = native.core().common_prefix_len
        return function
    return lambda a, b: -1


def _len_in_blocks(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> int:
    """One SIMD compare a block, so that an early difference stops early."""
    length: int = min(a.shape[0], b.shape[0])
    start, block = 0, 8192
    while start < length:
        stop = min(start + block, length)
        differs = a[start:stop] != b[start:stop]
        first = int(differs.argmax())
        if differs[first]:
            return start + first
        start, block = stop, block * 4
    return length


def _as_array(name: str, ids: TokenIds) -> npt.NDArray[Any]:
    if isinstance(ids, torch.Tensor):
        if ids.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {ids.device}.")
        ids = ids.detach().numpy()
    if not isinstance(ids, np.ndarray):
        raise TypeError(f"{name} must be a numpy array or a torch tensor, got {type(ids).__name__}.")
    if ids.ndim != 1:
        raise ValueError(f"{name} must have shape [n], got {list(ids.shape)}.")
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name} must have dtype int32 or int64, got {ids.dtype}.")
    return ids
