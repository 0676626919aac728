"""mla_attention in plain torch, one sequence at a time: the specification."""

from __future__ import annotations

import torch

from ..attention_options import AttentionOptions
from ..attention_plan import AttentionPlan
from .visible import visible_keys

__all__ = ["mla_attention"]


def mla_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    plan: AttentionPlan,
    options: AttentionOptions,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out and lse; everything is checked; q_rope and rope_pages are None when R is 0."""
    query_starts, page_starts = plan.query_indptr.tolist(), plan.page_indptr.tolist()
    for sequence, kv_len in enumerate(plan.seq_lens.tolist()):
        rows = slice(query_starts[sequence], query_starts[sequence + 1])
        pages = plan.page_indices[page_starts[sequence] : page_starts[sequence + 1]].to(torch.int64)
        # Slicing to kv_len before any arithmetic is what keeps garbage in the last page's tail out of the result.
        latent = latent_pages[pages].flatten(0, 1)[:kv_len].float()
        logits = torch.einsum("qhc,kc->hqk", q_latent[rows].float(), latent)
        if q_rope is not None and rope_pages is not None:
            rope = rope_pages[pages].flatten(0, 1)[:kv_len].float()
            logits += torch.einsum("qhr,kr->hqk", q_rope[rows].float(), rope)
        visible = visible_keys(plan, sequence, rows.stop - rows.start, kv_len)
        result, row_lse = _attend(logits * options.sm_scale, latent, visible)
        out[rows] = result.to(out.dtype)
        if lse is not None:
            lse[rows] = row_lse


def _attend(logits: torch.Tensor, latent: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out [q_len, H, C], lse [q_len, H] of logits [H, q_len, kv_len], latent [kv_len, C], visible [q_len, kv_len]."""
    num_heads, q_len, kv_len = logits.shape
    logits = logits.masked_fill(~visible, -torch.inf)
    highest = logits.amax(dim=-1) if kv_len else logits.new_full((num_heads, q_len), -torch.inf)
    base = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = torch.exp(logits - base[..., None])
    total = weights.sum(dim=-1)
    if bool(torch.isfinite(latent).all()):
        out = torch.einsum("hqk,kc->qhc", weights, latent)
    else:
        # Row by row over the keys it sees alone: 0 * NaN of a key that others see must not get in.
        rows = [weights[:, i, keep] @ latent[keep] for i, keep in enumerate(visible)]
        out = torch.stack(rows) if rows else latent.new_zeros(0, num_heads, latent.shape[1])
    empty = total == 0
    out = out / total.masked_fill(empty, 1.0).T[..., None]
    lse = torch.where(empty, -torch.inf, base + torch.log(total.masked_fill(empty, 1.0)))
    return out, lse.T
