"""paged_attention in plain torch, one sequence at a time: the specification."""

from __future__ import annotations

import torch

from ..attention_plan import AttentionPlan
from ..paged_attention import AttentionOptions

__all__ = ["paged_attention"]


def paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Pages in NHD order; fills out and lse; everything is checked."""
    query_starts, page_starts = plan.query_indptr.tolist(), plan.page_indptr.tolist()
    for sequence, kv_len in enumerate(plan.seq_lens.tolist()):
        rows = slice(query_starts[sequence], query_starts[sequence + 1])
        pages = plan.page_indices[page_starts[sequence] : page_starts[sequence + 1]].to(torch.int64)
        # Slicing to kv_len before any arithmetic is what keeps garbage in the last page's tail out of the result.
        key, value = (cached[pages].flatten(0, 1)[:kv_len].float() for cached in (key_pages, value_pages))
        visible = _visible(plan, sequence, rows.stop - rows.start, kv_len)
        result, row_lse = _attend(query[rows].float(), key, value, visible, plan, options)
        out[rows] = result.to(out.dtype)
        if lse is not None:
            lse[rows] = row_lse


def _visible(plan: AttentionPlan, sequence: int, q_len: int, kv_len: int) -> torch.Tensor:
    """[q_len, kv_len] bool: which keys each row sees."""
    device = plan.seq_lens.device
    positions = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    keys = torch.arange(kv_len, device=device)[None, :]
    if plan.custom_mask is not None and plan.mask_indptr is not None:
        start = int(plan.mask_indptr[sequence])
        visible = plan.custom_mask[start : start + q_len * kv_len].view(q_len, kv_len).clone()
    else:
        visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if plan.causal:
        visible &= keys <= positions
    if plan.window_left >= 0:
        visible &= keys >= positions - plan.window_left
    return visible


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_len, kv_len = visible.shape
    key, value = (tensor.repeat_interleave(plan.group, dim=1) for tensor in (key, value))
    logits = torch.einsum("qhd,khd->hqk", query, key) * options.sm_scale
    if options.soft_cap > 0:
        logits = options.soft_cap * torch.tanh(logits / options.soft_cap)
    if options.alibi_slopes is not None:
        positions = torch.arange(kv_len - q_len, kv_len, device=query.device)[:, None]
        distance = torch.arange(kv_len, device=query.device)[None, :] - positions
        logits = logits + options.alibi_slopes[:, None, None] * distance
    logits = logits.masked_fill(~visible, -torch.inf)
    highest = logits.amax(dim=-1) if kv_len else logits.new_full(logits.shape[:2], -torch.inf)
    if options.sinks is not None:
        highest = torch.maximum(highest, options.sinks[:, None])
    base = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = torch.exp(logits - base[..., None])
    total = weights.sum(dim=-1)
    if options.sinks is not None:
        total = total + torch.exp(options.sinks[:, None] - base)
    if bool(torch.isfinite(value).all()):
        out = torch.einsum("hqk,khd->qhd", weights, value)
    else:
        # Row by row over the keys it sees alone: 0 * NaN of a key that others see must not get in.
        rows = [torch.einsum("hk,khd->hd", weights[:, i, keep], value[keep]) for i, keep in enumerate(visible)]
        out = torch.stack(rows) if rows else query.new_zeros(0, query.shape[1], value.shape[2])
    empty = total == 0
    out = out / total.masked_fill(empty, 1.0).T[..., None]
    lse = torch.where(empty, -torch.inf, base + torch.log(total.masked_fill(empty, 1.0)))
    return out, lse.T
