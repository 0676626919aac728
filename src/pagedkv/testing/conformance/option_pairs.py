"""What options do together: every two of a table that do not set the same thing, and masks for any batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

__all__ = ["option_pairs", "random_mask"]


def option_pairs(options: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of each pair."""
    for (first, one), (second, other) in combinations(options.items(), 2):
        if not one.keys() & other.keys():
            yield f"{first}-and-{second}", {**one, **other}


def random_mask(q_lens: Sequence[int], kv_lens: Sequence[int]) -> torch.Tensor:
    """A flat custom mask that keeps 3 of 5 keys; the first row of the first sequence sees nothing."""
    mask = torch.rand(sum(q * kv for q, kv in zip(q_lens, kv_lens, strict=True))) < 0.6
    mask[: kv_lens[0]] = False
    return mask
