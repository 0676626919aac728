"""The pages of one device for multi-head latent attention: one allocation, and per-layer views of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.copy_pages import copy_pages
from ..kernels.gather_kv import gather_kv
from ..kernels.store_mla import store_mla
from ..spec import MLACacheSpec
from .page_pool import PagePool

__all__ = ["MLAPool"]


class _LayerViews(NamedTuple):
    pages: torch.Tensor
    latent: torch.Tensor
    rope: torch.Tensor


class MLAPool(PagePool[MLACacheSpec, _LayerViews]):
    """Latents and rope keys of `num_pages` pages over all layers, in one buffer.

    Shapes: pages(layer) [N, P, C + R], a view of `buffer`: latent and rope key of a token lie side by side;
            latent_pages(layer) [N, P, C] and rope_pages(layer) [N, P, R], its two parts.
            Order "layer_first" is one tensor [L, N, P, C + R], "page_first" [N, L, P, C + R].
    When:   pages start uninitialised; a slot holds something once it is stored to.
    Owns:   `buffer`. Who may write which page is the manager's business, not the pool's.
    Raises: ValueError, TypeError for a spec or a page count that cannot be.

    >>> pool = MLAPool(MLACacheSpec(num_layers=2, latent_dim=40, rope_dim=8, page_size=16), num_pages=10)
    >>> pool.latent_pages(0).shape, pool.rope_pages(0).shape
    (torch.Size([10, 16, 40]), torch.Size([10, 16, 8]))
    """

    _spec_type = MLACacheSpec

    def _layer_views(self) -> list[_LayerViews]:
        return _layer_views(self.buffer, self.spec, self.num_pages)

    def pages(self, layer: int) -> torch.Tensor:
        """Latents and rope keys of one layer, a view."""
        return self._layer(layer).pages

    def latent_pages(self, layer: int) -> torch.Tensor:
        """The latents of one layer, a view."""
        return self._layer(layer).latent

    def rope_pages(self, layer: int) -> torch.Tensor:
        """The rope keys of one layer, a view; of width 0 when the spec has none."""
        return self._layer(layer).rope

    def store(self, layer: int, latent: torch.Tensor, rope: torch.Tensor | None, slot_mapping: torch.Tensor) -> None:
        """Writes new latents [T, C] and rope keys [T, R] of one layer into their slots; see `pagedkv.store_mla`."""
        views = self._layer(layer)
        store_mla(latent, rope, views.latent, views.rope, slot_mapping)

    def gather(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of latents [n, C] and rope keys [n, R] of one layer in the named slots; see `pagedkv.gather_kv`."""
        views = self._layer(layer)
        latent, rope = gather_kv(views.latent[:, :, None], views.rope[:, :, None], slots)
        return latent[:, 0], rope[:, 0]

    def copy_pages(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies page src[i] over page dst[i] in all layers; src, dst [n] int64; see `pagedkv.copy_pages`."""
        if self.spec.order == "page_first":
            pages = self.buffer.view(self.num_pages, -1)
        else:
            pages = self.buffer.view(self.spec.num_layers, self.num_pages, -1).movedim(1, 0)
        copy_pages(pages, pages, src, dst)


def _layer_views(buffer: torch.Tensor, spec: MLACacheSpec, num_pages: int) -> list[_LayerViews]:
    inner = (spec.page_size, spec.latent_dim + spec.rope_dim)
    if spec.order == "page_first":
        layers = buffer.view(num_pages, spec.num_layers, *inner).transpose(0, 1)
    else:
        layers = buffer.view(spec.num_layers, num_pages, *inner)
    each = [layers[layer] for layer in range(spec.num_layers)]
    return [_LayerViews(pages, pages[..., : spec.latent_dim], pages[..., spec.latent_dim :]) for pages in each]
