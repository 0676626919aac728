"""Tokens, shuffled slots and rotated pages, for the ops that move tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagedkv.spec import SCALED_DTYPES

from .case import rotations
from .paged_kv import PAGE_SIZE, token_bytes

__all__ = ["SlotWorld", "TokenShape"]


@dataclass(frozen=True)
class TokenShape:
    """T tokens of Hk heads of D."""

    num_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V."""
        return 2 * self.num_tokens * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class SlotWorld:
    """key, value [T, Hk, D]; slots [T], any half of the pool in any order; pages(i) of round i, with zeros in them.

    page_dtype: that of the tokens, or a quantised one; quantised pages have scales(i).
    """

    def __init__(self, shape: TokenShape, layout: str, page_dtype: torch.dtype | None = None) -> None:
        self.layout = layout
        dtype = page_dtype or shape.dtype
        num_pages = max(64, 2 * -(-shape.num_tokens // PAGE_SIZE))
        self.key, self.value = torch.randn(2, shape.num_tokens, shape.num_kv_heads, shape.head_dim).to(shape.dtype)
        self.slots = torch.randperm(num_pages * PAGE_SIZE)[: shape.num_tokens]
        inner = (PAGE_SIZE, shape.num_kv_heads) if layout == "NHD" else (shape.num_kv_heads, PAGE_SIZE)
        count = rotations(shape.num_tokens * token_bytes(shape.num_kv_heads, shape.head_dim, dtype))
        self._pages = [torch.zeros(2, num_pages, *inner, shape.head_dim, dtype=dtype) for _ in range(count)]
        num_scales = num_pages if dtype in SCALED_DTYPES else 0
        self._scales = [torch.zeros(2, num_scales, shape.num_kv_heads, PAGE_SIZE) for _ in range(count)]

    def pages(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """key_pages and value_pages of round i."""
        key_pages, value_pages = self._pages[i % len(self._pages)]
        return key_pages, value_pages

    def scales(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """key_scales and value_scales [N, Hk, P] of round i."""
        key_scales, value_scales = self._scales[i % len(self._scales)]
        return key_scales, value_scales

    def far_from(self, i: int) -> int:
        """A round half a rotation away, for a peer that must not find in the caches what ours has just touched."""
        return i + len(self._pages) // 2

    def in_slot_order(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as [N, P, Hk, D]."""
        key_pages, value_pages = self.pages(i)
        if self.layout == "HND":
            return key_pages.transpose(1, 2), value_pages.transpose(1, 2)
        return key_pages, value_pages
