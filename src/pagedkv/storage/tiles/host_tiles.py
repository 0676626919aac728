"""The memory of a HostTileCache: one slot a tile, and how tiles are checked and moved. Knows of no keys and no lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.attention_checks import check_no_overlap
from ...kernels.copy_pages import copy_pages
from ...kernels.cpu.huge_pages import advise_huge_pages
from ...kernels.pages import check_memory, check_no_grad, check_writable
from ...kernels.quantize import QuantizedKV, quantize_kv
from ...shapes import Shapes, check_device, check_dtype, dtype_name
from .host_memory import BatchMemory
from .tile_geometry import TILE_DTYPES, TileGeometry

__all__ = ["HostTiles", "Tile", "TileContent"]

Tile = torch.Tensor | QuantizedKV


class TileContent(NamedTuple):
    """What is to be stored, in the dtype of the tiles; scales for int8 alone."""

    values: torch.Tensor
    scales: torch.Tensor | None


class HostTiles:
    """`capacity` uninitialised tiles in RAM.

    Shapes: values [capacity, tile_size, head_dim]; scales [capacity, tile_size] float32 for int8, else None.
    """

    def __init__(self, capacity: int, geometry: TileGeometry) -> None:
        self.geometry = geometry
        shape = capacity, geometry.tile_size, geometry.head_dim
        # Outside inference mode, so that the tiles can be written both inside and outside of it later.
        with torch.inference_mode(False):
            self.values = torch.empty(shape, dtype=geometry.dtype, device="cpu")
            self.scales = torch.empty(shape[:2], dtype=torch.float32, device="cpu") if geometry.has_scales else None
        advise_huge_pages(self.values)
        self._tile_shape = shape[1:]
        self._memory = BatchMemory()
        self.copy = _copier(self.values, self.scales)

    def view(self, slot: int) -> Tile:
        """One tile, in place."""
        return self.values[slot] if self.scales is None else QuantizedKV(self.values[slot], self.scales[slot])

    def write(self, slot: int, content: TileContent) -> None:
        """Stores one tile."""
        self.values[slot].copy_(content.values)
        if self.scales is not None and content.scales is not None:
            self.scales[slot].copy_(content.scales)

    def read_batch(self, slots: np.ndarray, out: Tile) -> None:
        """Copies tiles [n, ...] of the slots, int64 [n], to `out`."""
        ids, rows = torch.from_numpy(slots), torch.from_numpy(np.arange(len(slots)))
        values, scales = out if isinstance(out, QuantizedKV) else (out, None)
        copy_pages(self.values, values, ids, rows)
        if self.scales is not None and scales is not None:
            copy_pages(self.scales, scales, ids, rows)

    def write_batch(self, slots: np.ndarray, content: TileContent) -> None:
        """Stores tiles [n, ...] in the slots, int64 [n], no slot twice."""
        ids, rows = torch.from_numpy(slots), torch.from_numpy(np.arange(len(slots)))
        copy_pages(content.values, self.values, rows, ids)
        if self.scales is not None and content.scales is not None:
            copy_pages(content.scales, self.scales, rows, ids)

    def new_batch(self, num_tiles: int) -> Tile:
        """Memory for `num_tiles` tiles that are read."""
        values = self._memory.empty((num_tiles, *self._tile_shape), self.values.dtype)
        if self.scales is None:
            return values
        return QuantizedKV(values, torch.empty(num_tiles, self.scales.shape[1], dtype=torch.float32, device="cpu"))

    def check_out(self, out: object, num_tiles: int) -> Tile:
        """`out`, if as many tiles as that can be read into it."""
        if self.scales is None:
            return self._checked_result("out", out, num_tiles, "n tile_size head_dim", self.geometry.dtype)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"out must be a QuantizedKV (values, scales) for int8 tiles, got {type(out).__name__}.")
        values = self._checked_result("out.values", out[0], num_tiles, "n tile_size head_dim", torch.int8)
        scales = self._checked_result("out.scales", out[1], num_tiles, "n tile_size", torch.float32)
        check_no_overlap("out.scales", scales, **{"out.values": values})
        return QuantizedKV(values, scales)

    def checked(self, name: str, tiles: Tile, scales: torch.Tensor | None, num_tiles: int | None) -> TileContent:
        """What `put` and `put_batch` were given as what is stored: checked, and quantised where it must be."""
        if isinstance(tiles, QuantizedKV):
            if scales is not None:
                raise ValueError(f"scales must be None where {name} is a QuantizedKV, got a tensor.")
            tiles, scales = tiles
        if scales is None and self._is_plain(tiles, num_tiles):
            return TileContent(tiles, None)
        leading = "" if num_tiles is None else "n "
        shapes = self._shapes(num_tiles)
        shapes.check(name, tiles, f"{leading}tile_size head_dim")
        check_device(name, tiles, self.values.device, "the cache")
        check_no_grad(**{name: tiles})
        if self.scales is None and scales is not None:
            raise ValueError(f"scales must be None for {dtype_name(self.geometry.dtype)} tiles, got a tensor.")
        if self.scales is None:
            check_dtype(name, tiles, self.geometry.dtype)
            check_memory(**{name: tiles})
            return TileContent(tiles, None)
        check_memory(**{name: tiles, "scales": scales})
        if scales is None:
            floating = [dtype for dtype in TILE_DTYPES if dtype.is_floating_point]
            check_dtype(name, tiles, *floating, remedy="Pass scales to store codes as they are.")
            return _quantised(tiles)
        check_dtype(name, tiles, torch.int8, remedy="Without scales it is quantised on the way in.")
        shapes.check("scales", scales, f"{leading}tile_size")
        check_dtype("scales", scales, torch.float32)
        check_device("scales", scales, self.values.device, "the cache")
        check_no_grad(scales=scales)
        return TileContent(tiles, scales)

    def _is_plain(self, tiles: object, num_tiles: int | None) -> bool:
        """True only for what `checked` returns as it is: to look once costs a third of the checks with their words."""
        if type(tiles) is not torch.Tensor or self.scales is not None:
            return False
        shape = self._tile_shape if num_tiles is None else (num_tiles, *self._tile_shape)
        return (
            tiles.layout is torch.strided
            and tiles.dtype == self.values.dtype
            and tiles.shape == shape
            and tiles.device == self.values.device
            and not tiles.requires_grad
            and not tiles.is_neg()
            and tiles.data_ptr() != 0
        )

    def _checked_result(self, name: str, out: object, num_tiles: int, pattern: str, dtype: torch.dtype) -> torch.Tensor:
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(out).__name__}.")
        self._shapes(num_tiles).check(name, out, pattern)
        check_dtype(name, out, dtype)
        check_device(name, out, self.values.device, "the cache")
        check_writable(name, out)
        check_no_overlap(name, out, **{"tiles of the cache": self.values, "scales of the cache": self.scales})
        if out.requires_grad:
            raise ValueError(f"{name} must not require a gradient, got requires_grad=True. Pass {name}.detach().")
        if out.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} must not be an inference tensor outside inference mode. Pass {name}.clone().")
        return out

    def _shapes(self, num_tiles: int | None) -> Shapes:
        shapes = Shapes()
        shapes.bind("tile_size", self.geometry.tile_size, "the cache")
        shapes.bind("head_dim", self.geometry.head_dim, "the cache")
        if num_tiles is not None:
            shapes.bind("n", num_tiles, "keys")
        return shapes


def _copier(values: torch.Tensor, scales: torch.Tensor | None) -> Callable[[int], Tile]:
    """What copies the tile of a slot. numpy takes three quarters of torch's time for 8 KiB."""
    as_tensor, dtype = torch.from_numpy, values.dtype
    if dtype == torch.bfloat16:  # which numpy does not know
        take_bits = values.view(torch.int16).numpy().take
        return lambda slot: as_tensor(take_bits(slot, 0)).view(dtype)
    take = values.numpy().take
    if scales is None:
        return lambda slot: as_tensor(take(slot, 0))
    take_scales = scales.numpy().take
    return lambda slot: QuantizedKV(as_tensor(take(slot, 0)), as_tensor(take_scales(slot, 0)))


def _quantised(tiles: torch.Tensor) -> TileContent:
    *leading, head_dim = tiles.shape
    # The shape is spelt out: with no tiles at all there is nothing that -1 could be worked out from.
    rows = tiles.reshape(int(np.prod(leading)), 1, head_dim)
    codes, scales = quantize_kv(rows if rows.stride(-1) == 1 else rows.contiguous(), torch.int8)
    return TileContent(codes.view(tiles.shape), scales.view(leading))
