"""Attention of new tokens over the tiles of a cache: every pair of a row and a KV head is one sequence of pages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..kernels.attention_checks import as_float32
from ..kernels.exp_table import ExpTable
from ..kernels.merge_states import AttentionState
from ..kernels.paged_attention import paged_attention
from ..kernels.quantize import QuantizedKV
from ..kernels.rope import RotaryEmbedding
from ..shapes import (
    Shapes,
    check_choice,
    check_device,
    check_dtype,
    check_floating,
    check_int,
    check_last_dim_contiguous,
)
from ..storage.page_table import PageTable
from ..storage.tiles.host_tile_cache import HostTileCache
from ..storage.tiles.tile_cache import TileCache
from ..storage.tiles.tile_key import MAX_INDEX, PARTS, TileKey
from ..storage.tiles.tile_page_table import Indices
from .plan import plan_attention

__all__ = ["tile_attention"]

Mask = npt.NDArray[np.bool_]


def tile_attention(
    query: torch.Tensor,
    cache: TileCache | HostTileCache,
    seq_lens: torch.Tensor,
    *,
    beam_ids: torch.Tensor | None = None,
    num_kv_heads: int | None = None,
    sm_scale: float | None = None,
    temperature: float = 1.0,
    causal: bool = True,
    window_left: int = -1,
    soft_cap: float = 0.0,
    rope: RotaryEmbedding | None = None,
    softmax: str | ExpTable = "exact",
    missing: str = "error",
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | AttentionState:
    """Attention of each row's newest q_len tokens over the first seq_len tokens of the beam that the row reads.

    Shapes:  query [B, Hq, D], one new token a row, or [B, q_len, Hq, D]; seq_lens [B] int32, the new tokens included;
             beam_ids [B] int64, by default row b reads beam b. The result is [B, Hq, Dv] or [B, q_len, Hq, Dv] in the
             dtype of query; with return_lse AttentionState(out, lse), lse without the last dim, float32.
    Rule:    that of `paged_attention` with a KV head for every Hq / Hk query heads; token i of a row's q_len stands at
             position seq_len - q_len + i. The logits, soft cap included, are divided by temperature; sm_scale defaults
             to 1 / sqrt(D). With a RotaryEmbedding the tiles hold keys before rotation.
    Beams:   several rows may read one beam; of a HostTileCache beams are its sequences, and num_kv_heads must be given.
    Missing: a tile below seq_len that the cache does not hold is an error; with missing="skip" its tokens have the
             weight 0. A row that sees no key gives exactly 0 and -inf.
    Softmax: "exact", or "lut" or an ExpTable for exponentials by table lookup, as in `paged_attention`.
    Owns:    writes nothing; the tiles are pinned while it runs, or copied once from a HostTileCache, and count as used.
    When:    after the keys and values of the new tokens are stored.
    Raises:  ValueError, TypeError for what breaks the lines above and for what `paged_attention` refuses.

    >>> cache = TileCache(8, 4, 16, num_beams=2, num_heads=1, num_tiles=4)
    >>> cache.store(torch.randn(2, 1, 6, 16), torch.randn(2, 1, 6, 16), first_tokens=torch.zeros(2, dtype=torch.int64))
    >>> tile_attention(torch.randn(2, 3, 16), cache, torch.tensor([6, 5], dtype=torch.int32)).shape
    torch.Size([2, 3, 16])
    """
    check_choice("missing", missing, ("error", "skip"))
    batch = _checked_batch(query, cache, seq_lens, beam_ids, _bounds(cache, num_kv_heads))
    sm_scale, soft_cap = _at_temperature(sm_scale, soft_cap, temperature, query.shape[-1])
    with _readable_pages(cache, batch) as pages:
        table, mask = _page_table(batch, pages.ids, missing == "skip")
        plan = plan_attention(
            torch.arange(table.num_seqs + 1, dtype=torch.int32, device=query.device) * batch.query.shape[1],
            table,
            num_q_heads=batch.group,
            num_kv_heads=1,
            head_dim=pages.key.shape[2],
            value_dim=pages.value.shape[2],
            causal=causal,
            window_left=window_left,
            custom_mask=mask,
        )
        result = paged_attention(
            batch.rows(),
            pages.key[:, :, None],
            pages.value[:, :, None],
            plan,
            sm_scale=sm_scale,
            soft_cap=soft_cap,
            rope=rope,
            key_scales=pages.key_scales,
            value_scales=pages.value_scales,
            softmax=softmax,
            return_lse=return_lse,
            backend=backend,
        )
    if isinstance(result, AttentionState):
        return AttentionState(*(batch.as_query(rows).view(*query.shape[:-1], *rows.shape[2:]) for rows in result))
    return batch.as_query(result).view(*query.shape[:-1], result.shape[2])


class _Batch(NamedTuple):
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

    def rows(self) -> torch.Tensor:
        """The query as [B * Hk * q_len, group, D]; a copy only where several tokens meet several KV heads."""
        num_rows, q_len, _, head_dim = self.query.shape
        by_head = self.query.view(num_rows, q_len, self.num_kv_heads, self.group, head_dim).transpose(1, 2)
        return by_head.flatten(0, 2)

    def as_query(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows`, of results [B * Hk * q_len, group, ...]: [B, q_len, Hq, ...]."""
        num_rows, q_len = self.query.shape[:2]
        by_head = rows.view(num_rows, self.num_kv_heads, q_len, *rows.shape[1:])
        return by_head.transpose(1, 2).flatten(2, 3).contiguous()


class _Pages(NamedTuple):
    """Keys [N, P, D], values [N, P, Dv] and the scales of int8; ids [B, Hk, M] int32, -1 where a tile is missing."""

    key: torch.Tensor
    value: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None
    ids: torch.Tensor


def _at_temperature(
    sm_scale: float | None, soft_cap: float, temperature: float, head_dim: int
) -> tuple[float | None, float]:
    """sm_scale and soft_cap that give the logits divided by the temperature: c * tanh(x / c) / t is a cap of c / t."""
    if as_float32("temperature", temperature) <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}. For the best key alone, take the argmax.")
    for name, number in (("soft_cap", soft_cap), ("sm_scale", 1.0 if sm_scale is None else sm_scale)):
        as_float32(name, number)
    if temperature == 1:
        return sm_scale, soft_cap
    if sm_scale is None:
        sm_scale = 1 / math.sqrt(head_dim)
    return sm_scale / temperature, soft_cap / temperature


class _Bounds(NamedTuple):
    """What a cache can be asked for."""

    device: torch.device
    num_kv_heads: int
    num_beams: int
    num_tiles: int


def _bounds(cache: TileCache | HostTileCache, num_kv_heads: int | None) -> _Bounds:
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
    return _Bounds(torch.device("cpu"), num_kv_heads, MAX_INDEX + 1, MAX_INDEX + 1)


def _checked_batch(
    query: torch.Tensor,
    cache: TileCache | HostTileCache,
    seq_lens: torch.Tensor,
    beam_ids: torch.Tensor | None,
    bounds: _Bounds,
) -> _Batch:
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
    return _Batch(query[:, None] if one_token else query, bounds.num_kv_heads, tile_size, lengths, beams)


def _on_host(shapes: Shapes, name: str, index: torch.Tensor, dtype: torch.dtype, device: torch.device) -> Indices:
    """An array [B] of 64 bits from a tensor on the CPU or on the cache's device."""
    shapes.check(name, index, "B")
    check_dtype(name, index, dtype)
    if not index.is_cpu:
        check_device(name, index, device, "the cache")
    # A copy: the caller may write to its own meanwhile.
    return np.array(index.cpu().numpy(), np.int64)


def _check_range(name: str, index: Indices, most: int, what: str) -> None:
    outside = (index < 0) | (index > most)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(f"{name} must be in 0..{most} ({what}), got {index[row]} for row {row}.")


def _readable_pages(cache: TileCache | HostTileCache, batch: _Batch) -> AbstractContextManager[_Pages]:
    return _pinned_pages(cache, batch) if isinstance(cache, TileCache) else nullcontext(_copied_pages(cache, batch))


@contextmanager
def _pinned_pages(cache: TileCache, batch: _Batch) -> Iterator[_Pages]:
    """The pages of the cache as they lie."""
    num_tiles = int(batch.tile_counts.max(initial=0))
    with cache.pinned_pages(torch.from_numpy(batch.beams), num_tiles) as ids:
        yield _Pages(cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales, ids)


def _copied_pages(cache: HostTileCache, batch: _Batch) -> _Pages:
    """Copies of the tiles that the rows read, each once and all of one moment."""
    beams, row_of = np.unique(batch.beams, return_inverse=True)
    counts = np.zeros(len(beams), np.int64)
    np.maximum.at(counts, row_of, batch.tile_counts)
    ids = np.full((len(beams), batch.num_kv_heads, counts.max(initial=0)), -1, np.int32)
    wanted = np.broadcast_to(np.arange(ids.shape[2]) < counts[:, None, None], ids.shape)
    places = [(beams[beam].item(), head, tile) for beam, head, tile in np.argwhere(wanted).tolist()]
    held, tiles = _held_tiles(cache, places)
    numbers = np.full(len(places), -1, np.int32)
    numbers[held] = np.arange(len(held))
    ids[wanted] = numbers
    values, scales = tiles if isinstance(tiles, QuantizedKV) else (tiles, None)
    if not held:  # one page for the table to name, which no row sees
        values = values.new_zeros(2, *values.shape[1:])
        scales = None if scales is None else scales.new_zeros(2, *scales.shape[1:])
    key_scales, value_scales = (None, None) if scales is None else scales[:, None].chunk(2)
    key, value = values.chunk(2)
    return _Pages(key, value, key_scales, value_scales, torch.from_numpy(ids[row_of]))


def _held_tiles(
    cache: HostTileCache, places: list[tuple[int, int, int]]
) -> tuple[list[int], torch.Tensor | QuantizedKV]:
    """Which of the places have both keys and values, and these: first the keys of all, then the values."""
    held = list(range(len(places)))
    while True:
        try:
            return held, cache.get_batch([TileKey(*places[i], part) for part in PARTS for i in held])
        except KeyError:
            # Some were never there, or are gone by now.
            held = [i for i in held if all(cache.contains(TileKey(*places[i], part)) for part in PARTS)]


def _page_table(batch: _Batch, ids: torch.Tensor, skip: bool) -> tuple[PageTable, torch.Tensor | None]:
    """The table of the sequences (row, KV head), and the mask that hides missing tiles where there are such."""
    num_rows, num_heads, num_tiles = ids.shape
    counts, lengths = (per_row.repeat(num_heads) for per_row in (batch.tile_counts, batch.seq_lens))
    # In numpy: some tens of kilobytes are not worth waking torch's threads.
    pages = ids.cpu().numpy().reshape(num_rows * num_heads, num_tiles)
    used = np.arange(num_tiles) < counts[:, None]
    missing = used & (pages < 0)
    mask = None
    if missing.any():
        if not skip:
            raise _missing_tile(batch, int(missing.argmax()), num_tiles)
        mask = torch.from_numpy(_visible_tokens(~missing, lengths, batch)).to(ids.device)
    indptr = np.concatenate([[0], counts.cumsum()])
    last_page_len = lengths - (counts - 1).clip(min=0) * batch.tile_size
    # A missing tile is read from any page that exists: none of its tokens is seen.
    csr = (indptr, pages.clip(min=0)[used], last_page_len)
    tensors = (torch.from_numpy(array.astype(np.int32)).to(ids.device) for array in csr)
    return PageTable(*tensors, page_size=batch.tile_size), mask


def _visible_tokens(held: Mask, lengths: Indices, batch: _Batch) -> Mask:
    """The custom mask: for each sequence [q_len, seq_len], True where the tile of the key is held."""
    tokens = held.repeat(batch.tile_size, axis=1)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    shape = held.shape[0], batch.query.shape[1], tokens.shape[1]
    visible: Mask = np.broadcast_to(tokens[:, None], shape)[np.broadcast_to(inside[:, None], shape)]
    return visible


def _missing_tile(batch: _Batch, first: int, num_tiles: int) -> ValueError:
    sequence, tile = divmod(first, num_tiles)
    row, head = divmod(sequence, batch.num_kv_heads)
    return ValueError(
        f"cache must hold the {batch.seq_lens[row]} tokens that row {row} reads, got no tile for beam "
        f"{batch.beams[row]}, head {head}, tile {tile}. Store it, or pass missing='skip' to leave its tokens out."
    )
