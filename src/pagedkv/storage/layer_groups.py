"""Layers that share pages: those of one window, a page size for each group of them, one number of bytes for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..shapes import check_int
from ..spec import KVCacheSpec

__all__ = ["LayerGroup", "calc_bytes_per_page", "check_layer_groups", "make_layer_groups"]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that read one page table: their tokens come and go together.

    layers:    indices into the layers of a spec, ascending.
    window:    how many tokens each token sees, itself included; None is all of them. `window_left` of a plan is one
               less, of all -1.
    page_size: tokens of each of these layers that a page holds.
    Raises:    ValueError or TypeError when a field is not usable, naming the field.
    """

    layers: tuple[int, ...]
    window: int | None
    page_size: int

    def __post_init__(self) -> None:
        layers: object = self.layers
        if not isinstance(layers, (tuple, list)):
            raise TypeError(f"layers must be a tuple of ints, got {type(layers).__name__}.")
        object.__setattr__(self, "layers", tuple(layers))
        if not self.layers:
            raise ValueError("layers must name at least one layer, got none.")
        for index, layer in enumerate(self.layers):
            check_int(f"layers[{index}]", layer, minimum=0)
        if any(later <= layer for layer, later in zip(self.layers, self.layers[1:], strict=False)):
            raise ValueError(f"layers must be ascending, got {self.layers}.")
        if self.window is not None:
            check_int("window", self.window, minimum=1)
        check_int("page_size", self.page_size, minimum=1)

    def sub_spec(self, spec: KVCacheSpec) -> KVCacheSpec:
        """The spec of these layers alone, with their page size, each page one run of bytes."""
        layers = [spec.layers[layer] for layer in self.layers]
        return replace(
            spec,
            num_layers=len(layers),
            num_kv_heads=tuple(layer.num_kv_heads for layer in layers),
            head_dim=tuple(layer.head_dim for layer in layers),
            value_dim=tuple(layer.value_dim for layer in layers),
            page_size=self.page_size,
            order="page_first",
        )


def make_layer_groups(spec: KVCacheSpec, windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """Groups the layers of equal windows, and gives each group the page size that makes its pages as large as others'.

    windows: one a layer, as `LayerGroup.window`. Layers that store nothing (num_kv_heads 0) are in no group, whatever
             their window is.
    Sizes:   the group with most bytes a token gets spec.page_size. A group with b bytes a token, of at most B, gets
             B // b times as many, so that all page sizes are multiples of spec.page_size and no page needs more bytes
             than those of the first. Where b does not divide B, spec.page_size * (B % b) bytes at the end of each page
             of the group hold nothing: less than half of it. `HybridKVPool.num_wasted_bytes` is the number.
    Order:   the group without a window first, then by first layer.
    Raises:  ValueError, TypeError for windows that cannot be.

    >>> spec = KVCacheSpec(num_layers=6, num_kv_heads=1, head_dim=256, page_size=16)
    >>> full, sliding = make_layer_groups(spec, [512, 512, 512, 512, 512, None])
    >>> full
    LayerGroup(layers=(5,), window=None, page_size=80)
    >>> sliding
    LayerGroup(layers=(0, 1, 2, 3, 4), window=512, page_size=16)
    """
    _check_spec(spec)
    if not isinstance(windows, Sequence):
        raise TypeError(f"windows must be a sequence of ints and None, got {type(windows).__name__}.")
    if len(windows) != spec.num_layers:
        raise ValueError(f"windows must be {spec.num_layers}, one a layer of spec, got {len(windows)}.")
    layers_of: dict[int | None, list[int]] = {}
    for layer, (geometry, window) in enumerate(zip(spec.layers, windows, strict=True)):
        if window is not None:
            check_int(f"window of layer {layer}", window, minimum=1)
        if geometry.num_kv_heads:
            layers_of.setdefault(window, []).append(layer)
    by_first_layer = [LayerGroup(tuple(layers), window, spec.page_size) for window, layers in layers_of.items()]
    groups = sorted(by_first_layer, key=lambda group: group.window is not None)
    bytes_per_token = [group.sub_spec(spec).bytes_per_token for group in groups]
    return tuple(
        replace(group, page_size=spec.page_size * (max(bytes_per_token) // num_bytes))
        for group, num_bytes in zip(groups, bytes_per_token, strict=True)
    )


def calc_bytes_per_page(spec: KVCacheSpec, groups: Sequence[LayerGroup]) -> int:
    """Bytes of a page that any of the groups can be given: those of the group that needs most.

    >>> spec = KVCacheSpec(num_layers=6, num_kv_heads=1, head_dim=256, page_size=16)
    >>> calc_bytes_per_page(spec, make_layer_groups(spec, [512, 512, 512, 512, 512, None]))
    81920
    """
    check_layer_groups(spec, groups)
    return max(group.sub_spec(spec).bytes_per_page for group in groups)


def check_layer_groups(spec: KVCacheSpec, groups: Sequence[LayerGroup]) -> None:
    """Refuses groups that do not have each layer that stores something exactly once, and no other."""
    _check_spec(spec)
    if not isinstance(groups, Sequence):
        raise TypeError(f"groups must be a sequence of LayerGroups, got {type(groups).__name__}.")
    owners: dict[int, int] = {}
    for index, group in enumerate(groups):
        if not isinstance(group, LayerGroup):
            raise TypeError(f"groups[{index}] must be a LayerGroup, got {type(group).__name__}.")
        for layer in group.layers:
            if layer >= spec.num_layers:
                raise ValueError(f"layers of groups[{index}] must be in 0..{spec.num_layers - 1}, got {layer}.")
            if layer in owners:
                raise ValueError(
                    f"layer {layer} must be in one group, got groups[{owners[layer]}] and groups[{index}]."
                )
            owners[layer] = index
    for layer, geometry in enumerate(spec.layers):
        if geometry.num_kv_heads and layer not in owners:
            raise ValueError(f"layer {layer} must be in one group, got none.")
        if not geometry.num_kv_heads and layer in owners:
            raise ValueError(
                f"layer {layer} must be in no group, since it stores nothing (num_kv_heads 0), "
                f"got groups[{owners[layer]}]."
            )


def _check_spec(spec: KVCacheSpec) -> None:
    if not isinstance(spec, KVCacheSpec):
        raise TypeError(f"spec must be a KVCacheSpec, got {type(spec).__name__}.")
