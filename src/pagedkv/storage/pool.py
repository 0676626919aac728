"""The pages of one device: one allocation, and per-layer views of its keys and values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..kernels.copy_pages import copy_pages
from ..kernels.gather_kv import gather_kv
from ..kernels.quantize import dequantize_kv
from ..kernels.store_kv import store_kv
from ..spec import KVCacheSpec
from .page_pool import PageBuffer, PagePool

__all__ = ["KVPageBuffer", "KVPool", "LayerPages", "layer_views"]


class LayerPages(NamedTuple):
    """Pages of one layer, views of a pool's buffer, and their scales where its dtype has such."""

    key: torch.Tensor
    value: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None


class KVPageBuffer(PageBuffer[KVCacheSpec, LayerPages]):
    """Keys and values of each layer in pages: what all pools of them offer, whatever a page holds of which layer."""

    _spec_type = KVCacheSpec

    def _buffer_dtype(self) -> torch.dtype:
        # Scales and codes share a buffer of bytes.
        return torch.uint8 if self.spec.has_scales else self.spec.dtype

    def key_pages(self, layer: int) -> torch.Tensor:
        """The keys of one layer, a view."""
        return self._layer(layer).key

    def value_pages(self, layer: int) -> torch.Tensor:
        """The values of one layer, a view."""
        return self._layer(layer).value

    def key_scales(self, layer: int) -> torch.Tensor | None:
        """The scales of the keys of one layer, a view; None for a pool without scales."""
        return self._layer(layer).key_scales

    def value_scales(self, layer: int) -> torch.Tensor | None:
        """The scales of the values of one layer, a view; None for a pool without scales."""
        return self._layer(layer).value_scales

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Writes new keys and values of one layer into their slots; see `pagedkv.store_kv`.

        A pool with scales takes float32, float16 and bfloat16 and quantises them; any other takes its own dtype.
        """
        pages, value_pages, key_scales, value_scales = self._layer(layer)
        store_kv(
            key,
            value,
            pages,
            value_pages,
            slot_mapping,
            key_scales=key_scales,
            value_scales=value_scales,
            layout=self.spec.layout,
        )

    def gather(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys [n, Hk, D] and values [n, Hk, Dv] of one layer in the named slots; see `pagedkv.gather_kv`.

        A pool with scales gives the numbers that its codes stand for, in float32; any other gives its own dtype. The
        codes themselves are read from `key_pages` and `value_pages`.
        """
        pages, value_pages, key_scales, value_scales = self._layer(layer)
        key, value = gather_kv(pages, value_pages, slots, layout=self.spec.layout)
        if key_scales is None or value_scales is None:
            return key, value
        # Scales are pages of one element a head, in HND order whatever the layout of the pool.
        scales = gather_kv(key_scales[..., None], value_scales[..., None], slots, layout="HND")
        return dequantize_kv(key, scales[0][..., 0]), dequantize_kv(value, scales[1][..., 0])

    def copy_pages(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies page src[i] over page dst[i], all that it holds; src, dst [n] int64; see `pagedkv.copy_pages`."""
        for pages in self._pages_by_axis():
            copy_pages(pages, pages, src, dst)

    def _pages_by_axis(self) -> list[torch.Tensor]:
        """All bytes of the pool in views whose first axis is the page: as few as its order and its layers allow."""
        return [self.buffer.view(self.num_pages, -1)]


class KVPool(KVPageBuffer, PagePool[KVCacheSpec, LayerPages]):
    """Keys and values of `num_pages` pages over all layers, in one buffer.

    Shapes: key_pages(layer) [N, P, Hk, D], value_pages(layer) [N, P, Hk, Dv] ("HND": [N, Hk, P, D]), views of `buffer`.
            Order "layer_first" of a uniform spec is one tensor [2, L, N, P, Hk, D], "page_first" [N, L, 2, P, Hk, D].
    Scales: int8 and float8_e4m3fn add key_scales(layer) and value_scales(layer), [N, Hk, P] float32. The buffer is then
            bytes, and the scales lie before the pages: for "layer_first" before those of all pages, for "page_first" at
            the start of each page, so that a page is still one run of bytes with all that it needs.
    When:   pages start uninitialised; a slot holds something once it is stored to.
    Owns:   `buffer`. Who may write which page is the manager's business, not the pool's.
    Raises: ValueError, TypeError for a spec or a page count that cannot be.

    >>> pool = KVPool(KVCacheSpec(num_layers=2, num_kv_heads=3, head_dim=64, dtype=torch.float32), num_pages=10)
    >>> pool.key_pages(0).shape
    torch.Size([10, 16, 3, 64])
    """

    def _layer_views(self) -> list[LayerPages]:
        return layer_views(self.buffer, self.spec, self.num_pages, self.bytes_per_page)

    def _pages_by_axis(self) -> list[torch.Tensor]:
        if self.spec.order == "page_first":
            return super()._pages_by_axis()
        if self.spec.is_uniform:
            first = self._views[0]
            return [self._all_layers(pages) for pages in (first.key, first.key_scales) if pages is not None]
        return [pages for views in self._views for pages in views if pages is not None and pages.numel()]

    def _all_layers(self, first: torch.Tensor) -> torch.Tensor:
        """[N, 2 * L, ...]: pages or scales of all layers of a uniform "layer_first" pool, from the first layer's."""
        num_elements = first[0].numel()
        shape = self.num_pages, 2 * self.spec.num_layers, num_elements
        return first.as_strided(shape, (num_elements, self.num_pages * num_elements, 1))


_PairOfShapes = tuple[tuple[int, ...], tuple[int, ...]]


def layer_views(buffer: torch.Tensor, spec: KVCacheSpec, num_pages: int, bytes_per_page: int) -> list[LayerPages]:
    """The views of each layer of `spec`, in a buffer of pages that take at least as many bytes as those of `spec`.

    Bytes that are left over are the last of each page, in order "page_first".
    """

    def inner(num_heads: int, dim: int) -> tuple[int, ...]:
        return (spec.page_size, num_heads, dim) if spec.layout == "NHD" else (num_heads, spec.page_size, dim)

    page_shapes: list[_PairOfShapes] = [
        (inner(heads, dim), inner(heads, value_dim)) for heads, dim, value_dim in spec.layers
    ]
    if not spec.has_scales:
        pairs = _key_value_views(buffer, spec, num_pages, bytes_per_page, page_shapes)
        return [LayerPages(*pair, None, None) for pair in pairs]
    scale_shapes: list[_PairOfShapes] = [((layer.num_kv_heads, spec.page_size),) * 2 for layer in spec.layers]
    scales = _key_value_views(buffer.view(torch.float32), spec, num_pages, bytes_per_page, scale_shapes)
    num_scale_bytes = 4 * sum(math.prod(key) + math.prod(value) for key, value in scale_shapes)
    codes = buffer.view(spec.dtype)
    pages = _key_value_views(codes, spec, num_pages, bytes_per_page, page_shapes, num_before=num_scale_bytes)
    return [LayerPages(*pair, *scale_pair) for pair, scale_pair in zip(pages, scales, strict=True)]


def _key_value_views(
    buffer: torch.Tensor,
    spec: KVCacheSpec,
    num_pages: int,
    bytes_per_page: int,
    shapes: list[_PairOfShapes],
    num_before: int = 0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer, [N, *shape], where every page has `num_before` elements of other kinds before them.

    One rule gives both orders: a view is an offset and a page stride.
    """
    key_sizes, value_sizes = [math.prod(key) for key, _ in shapes], [math.prod(value) for _, value in shapes]
    page_elements = bytes_per_page // buffer.element_size()
    views = []
    for index, (key_shape, value_shape) in enumerate(shapes):
        keys_before, values_before = sum(key_sizes[:index]), sum(value_sizes[:index])
        if spec.order == "page_first":
            key_offset = num_before + keys_before + values_before
            value_offset = key_offset + key_sizes[index]
            strides = page_elements, page_elements
        else:
            key_offset = num_pages * (num_before + keys_before)
            value_offset = num_pages * (num_before + sum(key_sizes) + values_before)
            strides = key_sizes[index], value_sizes[index]
        key = _page_view(buffer, key_offset, strides[0], num_pages, key_shape)
        value = _page_view(buffer, value_offset, strides[1], num_pages, value_shape)
        views.append((key, value))
    return views


def _page_view(
    buffer: torch.Tensor, offset: int, page_stride: int, num_pages: int, shape: tuple[int, ...]
) -> torch.Tensor:
    inner = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return buffer.as_strided((num_pages, *shape), (page_stride, *inner), offset)
