"""Attention states merged in one step, in float64."""

from __future__ import annotations

import numpy as np

__all__ = ["merge_states"]


def merge_states(values, lse, out, out_lse):
    """Fills out and out_lse."""
    for row, head in np.ndindex(tuple(out_lse.shape)):
        logs = lse[row, :, head].numpy().astype(np.float64)
        seen = saw_keys(logs)
        out[row, head] = 0
        out_lse[row, head] = -np.inf
        if seen.any():
            highest = logs[seen].max()
            weights = np.exp(logs[seen] - highest)
            merged = weights @ values[row, :, head].numpy()[seen].astype(np.float64) / weights.sum()
            out[row, head] = out.new_tensor(merged)
            out_lse[row, head] = highest + np.log(weights.sum())


def saw_keys(logs):
    return logs > -np.inf
