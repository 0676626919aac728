"""Transformers' own cache with the loss of a cache dtype and nothing else: what pages of that dtype must equal.

Needs the extra `transformers`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from ..kernels.quantize import dequantize_kv, quantize_kv
from ..spec import SCALED_DTYPES

__all__ = ["RoundedCache", "rounded"]


class RoundedCache(DynamicCache):  # type: ignore[misc]  # transformers is not typed
    """A DynamicCache whose keys and values are what is left of them after storage in `dtype`; it has no pages.

    >>> cache = RoundedCache(None, torch.float8_e5m2)
    >>> cache.update(torch.full((1, 1, 1, 2), 1.1), torch.full((1, 1, 1, 2), 1.4), 0)
    (tensor([[[[1., 1.]]]]), tensor([[[[1.5000, 1.5000]]]]))
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__(config=config)
        self._dtype = dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keeps the rounded states [B, H, T, D], in their own dtype, and returns all that a query may see."""
        return super().update(rounded(key_states, self._dtype), rounded(value_states, self._dtype), *args, **kwargs)


def rounded(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What states [..., D] come back as from a pool of `dtype`, in their own dtype."""
    if dtype not in SCALED_DTYPES:
        return states.to(dtype).to(states.dtype)
    rows = states.reshape(-1, 1, states.shape[-1])
    codes, scales = quantize_kv(rows.float() if rows.dtype == torch.float64 else rows, dtype, backend="reference")
    return dequantize_kv(codes, scales).to(states.dtype).view(states.shape)
