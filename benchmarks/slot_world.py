"""Tokens, shuffled slots and rotated pages, for the ops that move tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .case import rotations

__all__ = ["SlotWorld", "TokenShape"]

_PAGE_SIZE = 16


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
    """key, value [T, Hk, D]; slots [T], any half of the pool in any order; pages(i) of round i, with zeros in them."""

    def __init__(self, shape: TokenShape, layout: str) -> None:
        self.layout = layout
        num_pages = max(64, 2 * -(-shape.num_tokens // _PAGE_SIZE))
        self.key, self.value = torch.randn(2, shape.num_tokens, shape.num_kv_heads, shape.head_dim).to(shape.dtype)
        self.slots = torch.randperm(num_pages * _PAGE_SIZE)[: shape.num_tokens]
        inner = (_PAGE_SIZE, shape.num_kv_heads) if layout == "NHD" else (shape.num_kv_heads, _PAGE_SIZE)
        self._pages = [
            torch.zeros(2, num_pages, *inner, shape.head_dim, dtype=shape.dtype)
            for _ in range(rotations(shape.num_bytes))
        ]

    def pages(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """key_pages and value_pages of round i."""
        key_pages, value_pages = self._pages[i % len(self._pages)]
        return key_pages, value_pages

    def far_from(self, i: int) -> int:
        """A round half a rotation away, for a peer that must not find in the caches what ours has just touched."""
        return i + len(self._pages) // 2

    def in_slot_order(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as [N, P, Hk, D]."""
        key_pages, value_pages = self.pages(i)
        if self.layout == "HND":
            return key_pages.transpose(1, 2), value_pages.transpose(1, 2)
        return key_pages, value_pages
