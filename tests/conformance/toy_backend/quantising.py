"""int8 codes, one row at a time, in numpy's float32."""

from __future__ import annotations

import numpy as np

__all__ = ["codes_and_scale", "quantize_kv"]


def quantize_kv(x, values, scales):
    """Fills values, int8, and scales."""
    for at in np.ndindex(tuple(scales.shape)):
        values.numpy()[at], scales.numpy()[at] = codes_and_scale(x.numpy()[at])


def codes_and_scale(row):
    row = row.astype(np.float32)
    largest = np.abs(row).max(initial=np.float32(0))
    if not np.isfinite(largest):
        return np.zeros(row.shape, np.int8), np.float32(np.nan)
    scale = scale_of(largest)
    return rounded(row / scale).astype(np.int8), scale


def scale_of(largest):
    if largest == 0:
        return np.float32(1)
    return max(largest / np.float32(127), np.finfo(np.float32).tiny)


def rounded(quotients):
    """To nearest, ties to even."""
    return np.rint(quotients)
