"""flashinfer.prefill: many query rows a sequence, over pages, packed keys and values, or one sequence."""

from __future__ import annotations

import functools

import torch

from .arguments import Result, Scale, check_backend, refuse
from .paged_prefill import BatchPrefillWithPagedKVCacheWrapper
from .planned import Logits
from .ragged_prefill import BatchPrefillWithRaggedKVCacheWrapper
from .single import attend_single
from .vendor_only import Refused, lookup

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: tuple[torch.Tensor, torch.Tensor] | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> Result:
    """Attention of one sequence's last rows over contiguous keys and values.

    Shapes: q [Tq, Hq, D]; k [L, Hk, D], v [L, Hk, Dv] ("HND": [Hk, L, D]); custom_mask [Tq, L] bool, True = keep, in
            place of causal, or packed_custom_mask [ceil(Tq * L / 8)] uint8, the lowest bit first; scale_q [Hq],
            scale_k, scale_v [Hk] or one number; out [Tq, Hq, Dv] in o_dtype, by default that of q; lse [Tq, Hq]
            float32, base 2.
    Rule:   row i stands at position L - Tq + i; causal is aligned bottom-right. Accumulation is float32, whatever
            use_fp16_qk_reduction says.
    Raises: KeyError for an unknown layout or position mode; ValueError for shapes, dtypes and an unknown back end.
    """
    check_backend(backend)
    refuse(kv_cache_sf=kv_cache_sf)
    return attend_single(
        q,
        k,
        v,
        Logits(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta),
        kv_layout=kv_layout,
        causal=causal,
        window_left=window_left,
        custom_mask=custom_mask,
        packed_custom_mask=packed_custom_mask,
        q_scale=scale_q,
        k_scale=_product(scale_k, k_scale),
        v_scale=_product(scale_v, v_scale),
        o_dtype=o_dtype,
        return_lse=return_lse,
    )


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)


def _product(by_head: torch.Tensor | None, scale: float | None) -> Scale:
    """Both apply; None is 1."""
    if by_head is None or scale is None:
        return scale if by_head is None else by_head
    return by_head * scale


def __getattr__(name: str) -> Refused:
    """Names of one vendor's libraries: there to be imported, and refusing when used."""
    return lookup(name, __name__)
