"""Attention of new tokens over the tiles of a cache: every pair of a row and a KV head is one sequence of pages."""

from __future__ import annotations

import math

import torch

from ..kernels.attention_checks import as_float32
from ..kernels.exp_table import ExpTable
from ..kernels.merge_states import AttentionState
from ..kernels.paged_attention import paged_attention
from ..kernels.rope import RotaryEmbedding
from ..shapes import check_choice, check_int
from ..storage.tiles.host_tile_cache import HostTileCache
from ..storage.tiles.tile_cache import TileCache
from .plan import plan_attention
from .tile_layout import lay_out, readable_pages
from .tile_rows import checked_rows

__all__ = ["tile_attention"]


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
    Cost:    goes by the tiles that are there, however large seq_len is; with rope by seq_len, which for a HostTileCache
             must then be at most capacity * tile_size.
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
    rows = checked_rows(query, cache, seq_lens, beam_ids, num_kv_heads, rope is not None)
    sm_scale, soft_cap = _at_temperature(sm_scale, soft_cap, temperature, query.shape[-1])
    check_int("window_left", window_left, minimum=-1)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}.")
    with readable_pages(cache, rows, missing == "skip") as pages:
        table, mask = lay_out(rows, pages.held, query.device, causal, window_left, rope is not None)
        plan = plan_attention(
            torch.arange(table.num_seqs + 1, dtype=torch.int32, device="cpu") * rows.query.shape[1],
            table,
            num_q_heads=rows.group,
            num_kv_heads=1,
            head_dim=pages.key.shape[2],
            value_dim=pages.value.shape[2],
            causal=causal if mask is None else False,
            window_left=window_left if mask is None else -1,
            custom_mask=mask,
        )
        result = paged_attention(
            rows.sequences(),
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
        return AttentionState(*(rows.as_query(part).view(*query.shape[:-1], *part.shape[2:]) for part in result))
    return rows.as_query(result).view(*query.shape[:-1], result.shape[2])


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
    remedy = "Take a higher temperature; for the best key alone, the argmax."
    return _divided("sm_scale", sm_scale, temperature, remedy), _divided("soft_cap", soft_cap, temperature, remedy)


def _divided(name: str, number: float, temperature: float, remedy: str) -> float:
    """number / temperature, which may be more than kernels can compute with."""
    quotient = float(number) / float(temperature)
    try:
        as_float32(name, quotient)
    except ValueError:
        raise ValueError(
            f"{name} / temperature must be a finite float32, got {number} / {temperature}. {remedy}"
        ) from None
    return quotient
