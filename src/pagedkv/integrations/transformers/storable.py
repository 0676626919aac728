"""A model's keys and values in the form in which a pool takes them."""

from __future__ import annotations

import torch

from ...spec import CACHE_DTYPES, KVCacheSpec

__all__ = ["as_storable"]


def as_storable(states: torch.Tensor, spec: KVCacheSpec) -> torch.Tensor:
    """Keys or values as `KVPool.store` takes them: rounded to the pool's dtype, but not for a pool with scales.

    Such a pool quantises by itself, and must see the numbers as they are: a cast to int8 would leave nothing of them.
    """
    dtype = spec.dtype
    if spec.has_scales:
        dtype = states.dtype if states.dtype in CACHE_DTYPES else torch.float32
    states = states.to(dtype)
    return states if states.stride(-1) == 1 else states.contiguous()
