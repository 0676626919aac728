"""Rows of a buffer one behind the other: the CSR form of a step's page table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .cpu import native

__all__ = ["gather_rows"]


def gather_rows(
    flat: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], indptr: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """The rows flat[starts[i] : starts[i] + indptr[i + 1] - indptr[i]], with 0 for entries below 0.

    Shapes: flat [F]; starts [S]; indptr [S + 1] gives [indptr[S]].
    """
    values = np.empty(indptr.item(-1), np.int32)
    _function()(flat, starts, indptr, values)
    return values


@functools.cache
def _function() -> Callable[..., None]:
    if native.unavailable() is None:
        function: Callable[..., None] = native.core().gather_rows
        return function
    return _gather


def _gather(flat: Any, starts: Any, indptr: Any, values: Any) -> None:
    stops = starts + np.diff(indptr)
    parts = [flat[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    np.concatenate([flat[:0], *parts], out=values)
    np.maximum(values, 0, out=values)
