"""The bytes of tiles on one device: pages of keys and of values, and their scales."""

from __future__ import annotations

import numpy as np
import torch

from ...kernels.copy_pages import copy_pages
from ...kernels.cpu.huge_pages import advise_huge_pages
from ...kernels.quantize import QuantizedKV
from ...kernels.store_kv import store_kv
from ...kernels.upload import uploaded
from .tile_geometry import TileGeometry
from .tile_page_table import Indices

__all__ = ["Tile", "TileBuffers"]

# One tile of keys or of values: codes with their scales for int8, numbers for all other dtypes.
Tile = torch.Tensor | QuantizedKV


class TileBuffers:
    """`num_pages` pages that hold a tile of keys and one of values each; which page is whose is not known here.

    Shapes: key_pages [N, tile_size, head_dim]; value_pages [N, tile_size, value_dim];
            key_scales, value_scales [N, 1, tile_size] float32 for int8, else None.
    When:   pages start uninitialised; a token's place holds something once it is written.
    """

    def __init__(self, geometry: TileGeometry, num_pages: int, device: torch.device | str | int) -> None:
        size, dtype = geometry.tile_size, geometry.dtype
        self.geometry = geometry
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None
        # Outside inference mode, so that pages can be written inside and outside of it later.
        with torch.inference_mode(False):
            self.key_pages = torch.empty(num_pages, size, geometry.head_dim, dtype=dtype, device=device)
            self.value_pages = torch.empty(num_pages, size, geometry.value_dim, dtype=dtype, device=device)
            if geometry.has_scales:
                self.key_scales = torch.empty(num_pages, 1, size, device=device, dtype=torch.float32)
                self.value_scales = torch.empty(num_pages, 1, size, device=device, dtype=torch.float32)
        for pages in self._all():
            advise_huge_pages(pages)

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.key_pages.device

    def view(self, page: int, part: str) -> Tile:
        """The tile of keys ("k") or values ("v") on a page, where it lies."""
        pages, scales = (self.key_pages, self.key_scales) if part == "k" else (self.value_pages, self.value_scales)
        return pages[page] if scales is None else QuantizedKV(pages[page], scales[page, 0])

    def read(self, page: int, part: str) -> Tile:
        """A copy of the tile of keys or values on a page."""
        tile = self.view(page, part)
        return tile.clone() if isinstance(tile, torch.Tensor) else QuantizedKV(tile.values.clone(), tile.scales.clone())

    def copy(self, src: Indices, dst: Indices) -> None:
        """Copies all that page src[i] holds over page dst[i]; no page is in both."""
        if src.size:
            src_ids, dst_ids = self._on_device(src), self._on_device(dst)
            for pages in self._all():
                copy_pages(pages, pages, src_ids, dst_ids)

    def blank(self, pages: Indices) -> None:
        """Makes all tokens of pages what a store of zeros makes them."""
        if pages.size:
            ids = self._on_device(pages)
            for tokens in (self.key_pages, self.value_pages):
                tokens.index_fill_(0, ids, 0)
            for scales in (self.key_scales, self.value_scales):
                if scales is not None:
                    scales.index_fill_(0, ids, 1)

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: Indices) -> None:
        """Writes tokens [n, 1, head_dim] and [n, 1, value_dim] into their slots, page * tile_size + offset."""
        store_kv(
            key,
            value,
            self.key_pages[:, :, None],
            self.value_pages[:, :, None],
            self._on_device(slots),
            key_scales=self.key_scales,
            value_scales=self.value_scales,
        )

    def gather(self, pages: Indices) -> tuple[torch.Tensor, ...]:
        """Copies of pages on the CPU: keys and values [n, tile_size, ...], for int8 their scales [n, tile_size] too."""
        ids = self._on_device(pages)
        return tuple(kept.index_select(0, ids).cpu() for kept in self._pages_of_tokens())

    def load(self, tiles: tuple[torch.Tensor, ...]) -> None:
        """Writes what `gather` gave into the first n pages."""
        for kept, saved in zip(self._pages_of_tokens(), tiles, strict=True):
            kept[: saved.shape[0]].copy_(saved)

    def _all(self) -> list[torch.Tensor]:
        buffers = self.key_pages, self.value_pages, self.key_scales, self.value_scales
        return [pages for pages in buffers if pages is not None]

    def _pages_of_tokens(self) -> list[torch.Tensor]:
        """All buffers as [N, tile_size, ...]."""
        scales = [scales[:, 0] for scales in (self.key_scales, self.value_scales) if scales is not None]
        return [self.key_pages, self.value_pages, *scales]

    def _on_device(self, indices: Indices) -> torch.Tensor:
        return uploaded(np.ascontiguousarray(indices), self.device)
