"""Attention in float64, and how far from the truth a result may be before it is wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .case import OURS, WrongResultError
from .paged_kv import KV

__all__ = ["check_error", "exact_attention"]


def check_error(ours: torch.Tensor, peer: torch.Tensor, truth: torch.Tensor) -> None:
    """Ours may err at most twice as far from float64 as `peer`, torch on the same numbers, plus one rounding."""
    rounding = torch.finfo(ours.dtype).eps * float(truth.abs().max())
    allowed = 2 * float((peer.double() - truth).abs().max()) + rounding
    error = float((ours.double() - truth).abs().max())
    if not error <= allowed:
        raise WrongResultError(f"{OURS} is off by {error:.3g}, allowed are {allowed:.3g}")


def exact_attention(
    query: torch.Tensor,
    kv: KV,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Float64 attention of one sequence, query [Hq, q_len, D], head by head, so that a long prompt fits in memory."""
    group = query.shape[0] // kv.key.shape[0]
    heads = []
    for head in range(query.shape[0]):
        key, value = kv.at(head // group).numbers(torch.float64)
        row = query[head].double()[None]
        heads.append(
            F.scaled_dot_product_attention(
                row, key[None], value[None], attn_mask=mask, is_causal=is_causal, scale=scale
            )[0]
        )
    return torch.stack(heads)
