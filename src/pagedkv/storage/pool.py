"""The pages of one device: one allocation, and per-layer views of its keys and values."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.copy_pages import copy_pages
from ..kernels.gather_kv import gather_kv
from ..kernels.store_kv import store_kv
from ..shapes import check_int
from ..spec import KVCacheSpec

__all__ = ["KVPool"]


class KVPool:
    """Keys and values of `num_pages` pages over all layers, in one buffer.

    Shapes: key_pages(layer) [N, P, Hk, D], value_pages(layer) [N, P, Hk, Dv] ("HND": [N, Hk, P, D]), views of `buffer`.
            Order "layer_first" of a uniform spec is one tensor [2, L, N, P, Hk, D], "page_first" [N, L, 2, P, Hk, D].
    When:   pages start uninitialised; a slot holds something once it is stored to.
    Owns:   `buffer`. Who may write which page is the manager's business, not the pool's.
    Raises: ValueError, TypeError for a spec or a page count that cannot be.

    >>> pool = KVPool(KVCacheSpec(num_layers=2, num_kv_heads=3, head_dim=64, dtype=torch.float32), num_pages=10)
    >>> pool.key_pages(0).shape
    torch.Size([10, 16, 3, 64])
    """

    def __init__(self, spec: KVCacheSpec, num_pages: int, device: torch.device | str = "cpu") -> None:
        if not isinstance(spec, KVCacheSpec):
            raise TypeError(f"spec must be a KVCacheSpec, got {type(spec).__name__}.")
        check_int("num_pages", num_pages, minimum=1)
        self.spec = spec
        self.num_pages = num_pages
        page_elements = spec.bytes_per_page // spec.dtype.itemsize
        # Outside inference mode, so that the pool can be written both inside and outside of it later.
        with torch.inference_mode(False):
            self.buffer = torch.empty(num_pages * page_elements, dtype=spec.dtype, device=device)
        self._views = _layer_views(self.buffer, spec, num_pages)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Views that travelled by themselves would no longer be views of the buffer.
        vars(self).update(state)
        self._views = _layer_views(self.buffer, self.spec, self.num_pages)

    @property
    def device(self) -> torch.device:
        """Where the buffer is."""
        return self.buffer.device

    @property
    def page_size(self) -> int:
        """Token slots a page."""
        return self.spec.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel() * self.buffer.element_size()

    def key_pages(self, layer: int) -> torch.Tensor:
        """The keys of one layer, a view."""
        return self._layer(layer)[0]

    def value_pages(self, layer: int) -> torch.Tensor:
        """The values of one layer, a view."""
        return self._layer(layer)[1]

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Writes new keys and values of one layer into their slots; see `pagedkv.store_kv`."""
        store_kv(key, value, *self._layer(layer), slot_mapping, layout=self.spec.layout)

    def gather(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys [n, Hk, D] and values [n, Hk, Dv] of one layer in the named slots; see `pagedkv.gather_kv`."""
        return gather_kv(*self._layer(layer), slots, layout=self.spec.layout)

    def copy_pages(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies page src[i] over page dst[i] in all layers; src, dst [n] int64; see `pagedkv.copy_pages`."""
        for pages in self._pages_by_axis():
            copy_pages(pages, pages, src, dst)

    def _pages_by_axis(self) -> list[torch.Tensor]:
        """All bytes of the pool in views whose first axis is the page: one view, or one a layer when layers differ."""
        if self.spec.order == "page_first":
            return [self.buffer.view(self.num_pages, -1)]
        if self.spec.is_uniform:
            return [self.buffer.view(2 * self.spec.num_layers, self.num_pages, -1).movedim(1, 0)]
        return [pages for views in self._views for pages in views if pages.numel()]

    def _layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"layer must be an int, got {type(layer).__name__}.")
        if not 0 <= layer < len(self._views):
            raise ValueError(f"layer must be in 0..{len(self._views) - 1}, got {layer}.")
        return self._views[layer]

    def __repr__(self) -> str:
        size = f"{self.num_bytes / 2**20:.1f} MiB"
        return f"KVPool(num_pages={self.num_pages}, device={str(self.device)!r}, {size}, {self.spec})"


def _layer_views(buffer: torch.Tensor, spec: KVCacheSpec, num_pages: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer. One rule gives both orders: a view is an offset and a page stride."""
    page_elements = spec.bytes_per_page // spec.dtype.itemsize
    key_sizes = [spec.page_size * layer.num_kv_heads * layer.head_dim for layer in spec.layers]
    value_sizes = [spec.page_size * layer.num_kv_heads * layer.value_dim for layer in spec.layers]
    views = []
    for index, layer in enumerate(spec.layers):
        if spec.order == "page_first":
            key_offset = sum(key_sizes[:index]) + sum(value_sizes[:index])
            value_offset = key_offset + key_sizes[index]
            strides = page_elements, page_elements
        else:
            key_offset = num_pages * sum(key_sizes[:index])
            value_offset = num_pages * (sum(key_sizes) + sum(value_sizes[:index]))
            strides = key_sizes[index], value_sizes[index]
        views.append(
            (
                _page_view(buffer, key_offset, strides[0], num_pages, spec, layer.num_kv_heads, layer.head_dim),
                _page_view(buffer, value_offset, strides[1], num_pages, spec, layer.num_kv_heads, layer.value_dim),
            )
        )
    return views


def _page_view(
    buffer: torch.Tensor, offset: int, page_stride: int, num_pages: int, spec: KVCacheSpec, num_heads: int, dim: int
) -> torch.Tensor:
    inner = (spec.page_size, num_heads, dim) if spec.layout == "NHD" else (num_heads, spec.page_size, dim)
    return buffer.as_strided((num_pages, *inner), (page_stride, inner[1] * dim, dim, 1), offset)
