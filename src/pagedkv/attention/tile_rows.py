"""The rows of a call of `tile_attention`: checked, and laid out as sequences of one KV head each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..shapes import Shapes, check_device, check_dtype, check_floating, check_int, check_last_dim_contiguous
from ..storage.tiles.host_tile_cache import HostTileCache
from ..storage.tiles.tile_cache import TileCache
from ..storage.tiles.tile_key import MAX_INDEX
from ..storage.tiles.tile_page_table import Indices, copied_indices

__all__ = ["TileRows", "checked_rows"]


class TileRows(NamedTuple):
    """The checked rows: query [B, q_len, Hq, D]; seq_lens and beams [B] on the host."""

    query: torch.Tensor
    num_kv_heads: int
    tile_size: int
    seq_lens: Indices
    beams: Indices

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.query.shape[2] // self.num_kv_heads

    @property
    def tile_counts(self) -> Indices:
        """[B]: the tiles that each row reads of a head."""
        return -(-self.seq_lens // self.tile_size)

    def sequences(self) -> torch.Tensor:
        """The query as [B * Hk * q_len, group, D]; a copy only where several tokens meet several KV heads."""
        num_rows, q_len, _, head_dim = self.query.shape
        by_head = self.query.view(num_rows, q_len, self.num_kv_heads, self.group, head_dim).transpose(1, 2)
        return by_head.flatten(0, 2)

    def as_query(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `sequences`, of results [B * Hk * q_len, group, ...]: [B, q_len, Hq, ...]."""
        num_rows, q_len = self.query.shape[:2]
        by_head = rows.view(num_rows, self.num_kv_heads, q_len, *rows.shape[1:])
        return by_head.transpose(1, 2).flatten(2, 3).contiguous()


class _Bounds(NamedTuple):
    """What a cache can be asked for."""

    device: torch.device
    num_kv_heads: int
    num_beams: int
    num_tiles: int


def _bounds(cache: TileCache | HostTileCache, num_kv_heads: int | None, has_rope: bool) -> _Bounds:
    if num_kv_heads is not None:
        check_int("num_kv_heads", num_kv_heads, minimum=1)
    if isinstance(cache, TileCache):
        if num_kv_heads not in (None, cache.num_heads):
            raise ValueError(f"num_kv_heads must be {cache.num_heads} like that of the cache, got {num_kv_heads}.")
        return _Bounds(cache.device, cache.num_heads, cache.num_beams, cache.num_tiles)
    if not isinstance(cache, HostTileCache):
        raise TypeError(f"cache must be a TileCache or a HostTileCache, got {type(cache).__name__}.")
    if num_kv_heads is None:
        raise ValueError("num_kv_heads must be given for a HostTileCache, whose keys do not tell it, got None.")
    # Rotation takes a place in the layout for every token below seq_len: no more of them than the cache has room for.
    num_tiles = cache.capacity if has_rope else MAX_INDEX + 1
    return _Bounds(torch.device("cpu"), num_kv_heads, MAX_INDEX + 1, num_tiles)


def checked_rows(
    query: torch.Tensor,
    cache: TileCache | HostTileCache,
    seq_lens: torch.Tensor,
    beam_ids: torch.Tensor | None,
    num_kv_heads: int | None,
    has_rope: bool,
) -> TileRows:
    """The rows, after everything about them that does not depend on which tiles are there was refused."""
    bounds = _bounds(cache, num_kv_heads, has_rope)
    shapes = Shapes(D=cache.geometry.head_dim)
    one_token = isinstance(query, torch.Tensor) and query.dim() == 3
    shapes.check("query", query, "B Hq D" if one_token else "B q_len Hq D")
    check_floating("query", query)
    check_last_dim_contiguous("query", query)
    check_device("query", query, bounds.device, "the cache")
    if not shapes["Hq"] or shapes["Hq"] % bounds.num_kv_heads:
        raise ValueError(
            f"heads of query must be a multiple of num_kv_heads = {bounds.num_kv_heads} of the cache, "
            f"got {shapes['Hq']}."
        )
    tile_size = cache.geometry.tile_size
    lengths = _on_host(shapes, "seq_lens", seq_lens, torch.int32, bounds.device)
    _check_range("seq_lens", lengths, bounds.num_tiles * tile_size, f"{bounds.num_tiles} tiles of {tile_size} tokens")
    if beam_ids is None:
        beams = np.arange(shapes["B"])
        if beams.size > bounds.num_beams:
            raise ValueError(
                f"query must have at most {bounds.num_beams} rows (num_beams of the cache) without beam_ids, "
                f"got {beams.size}. Say with beam_ids which beam each row reads."
            )
    else:
        beams = _on_host(shapes, "beam_ids", beam_ids, torch.int64, bounds.device)
        _check_range("beam_ids", beams, bounds.num_beams - 1, "the last beam")
    return TileRows(query[:, None] if one_token else query, bounds.num_kv_heads, tile_size, lengths, beams)


def _on_host(shapes: Shapes, name: str, index: torch.Tensor, dtype: torch.dtype, device: torch.device) -> Indices:
    """An array [B] of 64 bits from a tensor on the CPU or on the cache's device."""
    shapes.check(name, index, "B")
    check_dtype(name, index, dtype)
    if not index.is_cpu:
        check_device(name, index, device, "the cache")
    return copied_indices(index)


def _check_range(name: str, index: Indices, most: int, what: str) -> None:
    outside = (index < 0) | (index > most)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(f"{name} must be in 0..{most} ({what}), got {index[row]} for row {row}.")
