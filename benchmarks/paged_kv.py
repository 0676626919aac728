"""Random keys and values in pages, and the same taken out of them: quantised ones go with their scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import pagedkv
from pagedkv.spec import SCALED_DTYPES

__all__ = ["KV", "PAGE_SIZE", "gathered", "random_pages", "token_bytes"]

PAGE_SIZE = 16


class KV(NamedTuple):
    """Keys and values, in pages or by sequence and head; quantised ones have a scale for each token and head."""

    key: torch.Tensor
    value: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    def clone(self) -> KV:
        """The same in other memory."""
        return self._each(torch.Tensor.clone)

    def contiguous(self) -> KV:
        """The same without gaps."""
        return self._each(torch.Tensor.contiguous)

    def at(self, index: int) -> KV:
        """One entry of the first axis."""
        return self._each(lambda tensor: tensor[index])

    def numbers(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """What the elements of keys and values stand for, computed in `dtype`."""
        if self.key_scales is None or self.value_scales is None:
            return self.key.to(dtype), self.value.to(dtype)
        return self.key.to(dtype) * self.key_scales[..., None], self.value.to(dtype) * self.value_scales[..., None]

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> KV:
        scales = (None if tensor is None else change(tensor) for tensor in (self.key_scales, self.value_scales))
        return KV(change(self.key), change(self.value), *scales)


def token_bytes(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the key and value of one token, with the scales of each head if they are quantised."""
    return 2 * num_kv_heads * (head_dim * dtype.itemsize + (4 if dtype in SCALED_DTYPES else 0))


def random_pages(num_pages: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, layout: str) -> KV:
    """Pages [N, P, Hk, D] ("HND": [N, Hk, P, D]) and scales [N, Hk, P], full of tokens."""
    inner = (PAGE_SIZE, num_kv_heads) if layout == "NHD" else (num_kv_heads, PAGE_SIZE)
    numbers = torch.randn(2, num_pages, *inner, head_dim)
    if dtype not in SCALED_DTYPES:
        return KV(*numbers.to(dtype))
    # Rounding of any quality would do: what the pages stand for is read back from them.
    codes, scales = pagedkv.quantize_kv(numbers.view(-1, 1, head_dim), dtype)
    scales = scales.view(2, num_pages, *inner)
    if layout == "NHD":
        scales = scales.transpose(2, 3).contiguous()
    return KV(*codes.view(numbers.shape), *scales)


def gathered(pages: KV, rows: torch.Tensor, kv_len: int, layout: str) -> KV:
    """[S, Hk, kv_len, D] and scales [S, Hk, kv_len] by one index_select a tensor, for sequences of equal lengths.

    rows: [S, pages of a sequence] int64.
    """

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(0, rows.flatten()).view(*rows.shape, *tensor.shape[1:])

    def by_head(tensor: torch.Tensor) -> torch.Tensor:
        order = (0, 3, 1, 2, 4) if layout == "NHD" else (0, 2, 1, 3, 4)
        return taken(tensor).permute(order).flatten(2, 3)[:, :, :kv_len]

    key, value = by_head(pages.key), by_head(pages.value)
    if pages.key_scales is None or pages.value_scales is None:
        return KV(key, value)
    scales = (taken(tensor).transpose(1, 2).flatten(2, 3) for tensor in (pages.key_scales, pages.value_scales))
    return KV(key, value, *(tensor[..., :kv_len] for tensor in scales))
