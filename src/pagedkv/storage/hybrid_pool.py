"""The pages of one device for models whose layers differ: any page can be given to any group of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..spec import KVCacheSpec
from .layer_groups import LayerGroup, calc_bytes_per_page
from .pool import KVPageBuffer, LayerPages, layer_views

__all__ = ["HybridKVPool"]


class HybridKVPool(KVPageBuffer):
    """Keys and values of groups of layers, full and sliding ones for example, in pages of one number of bytes.

    Shapes: key_pages(layer) [N, P, Hk, D], value_pages(layer) [N, P, Hk, Dv] ("HND": [N, Hk, P, D]), with P the page
            size of the layer's group, `group_of(layer).page_size`; views of `buffer`, where page p is the bytes
            [p * bytes_per_page, (p + 1) * bytes_per_page). Within them lie the layers of one group, as in a KVPool of
            these layers alone of order "page_first", which the spec must have.
            Views of different groups share all bytes: page p may be read and written in the layers of the group that
            it was given to, and of no other.
    Slots:  slot = page * P + offset, with that P.
    Scales: as in KVPool, at the start of each page.
    Layers: each that stores something is in exactly one of `groups`; one that stores nothing (num_kv_heads 0) is in
            none, and is refused wherever a layer is named. `make_layer_groups` makes groups for which little is wasted.
    Sizes:  spec.page_size, bytes_per_page and num_pages(memory_bytes) are those of a KVPool and mean nothing here.
            bytes_per_page of the pool, or `calc_bytes_per_page(spec, groups)`, is what one page takes.
    When:   pages start uninitialised; a slot holds something once it is stored to.
    Owns:   `buffer`. Who may write which page is the manager's business, not the pool's.
    Raises: ValueError, TypeError for a spec, groups or a page count that cannot be.

    >>> from pagedkv.storage import make_layer_groups
    >>> spec = KVCacheSpec(num_layers=6, num_kv_heads=1, head_dim=256, order="page_first")
    >>> pool = HybridKVPool(spec, make_layer_groups(spec, [512, 512, 512, 512, 512, None]), num_pages=10)
    >>> pool.key_pages(0).shape, pool.key_pages(5).shape
    (torch.Size([10, 16, 1, 256]), torch.Size([10, 80, 1, 256]))
    >>> pool.bytes_per_page, pool.num_wasted_bytes
    (81920, (0, 0))
    """

    def __init__(
        self, spec: KVCacheSpec, groups: Sequence[LayerGroup], num_pages: int, device: torch.device | str = "cpu"
    ) -> None:
        self._bytes_per_page = calc_bytes_per_page(spec, groups)
        if spec.order != "page_first":
            raise ValueError(
                f"order of spec must be 'page_first', since a page goes to one group or another, got {spec.order!r}."
            )
        self.groups = tuple(groups)
        self._group_of_layer = {layer: group for group in groups for layer in group.layers}
        super().__init__(spec, num_pages, device)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page, whatever group it is given to."""
        return self._bytes_per_page

    @property
    def num_wasted_bytes(self) -> tuple[int, ...]:
        """For each group, the bytes of each of its pages that hold nothing."""
        return tuple(
            self.bytes_per_page - group.page_size * group.sub_spec(self.spec).bytes_per_token for group in self.groups
        )

    def group_of(self, layer: int) -> LayerGroup:
        """The group of a layer."""
        self._check_layer(layer)
        group = self._group_of_layer.get(layer)
        if group is None:
            raise ValueError(f"layer must be one of a group, got {layer}, which stores nothing (num_kv_heads 0).")
        return group

    def _layer(self, layer: int) -> LayerPages:
        self.group_of(layer)
        return self._views[layer]

    def _layer_views(self) -> list[LayerPages]:
        # Layers of no group are refused before anybody sees their views.
        nothing = self.buffer[:0]
        views = [LayerPages(nothing, nothing, None, None)] * self.spec.num_layers
        for group in self.groups:
            of_group = layer_views(self.buffer, group.sub_spec(self.spec), self.num_pages, self.bytes_per_page)
            for layer, pages in zip(group.layers, of_group, strict=True):
                views[layer] = pages
        return views

    def _contents(self) -> str:
        return f"{self.groups}, {self.spec}"
