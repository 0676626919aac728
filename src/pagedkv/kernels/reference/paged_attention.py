"""paged_attention in plain torch, one sequence at a time: the specification."""

from __future__ import annotations

import torch

from ..attention_options import AttentionOptions
from ..attention_plan import AttentionPlan
from .rope import rotate
from .visible import visible_keys

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
        key = _tokens(key_pages, options.key_scales, pages, kv_len)
        value = _tokens(value_pages, options.value_scales, pages, kv_len)
        new = query[rows].float()
        positions = torch.arange(kv_len - len(new), kv_len, device=query.device)
        if options.rope_table is not None:
            key = _turned(key, torch.arange(kv_len, device=query.device), options)
            new = _turned(new, positions, options)
        visible = visible_keys(plan, sequence, len(new), kv_len)
        result, row_lse = _attend(new, key, value, positions, visible, plan, options)
        out[rows] = (result * options.value_scale).to(out.dtype)
        if lse is not None:
            lse[rows] = row_lse


def _tokens(cached: torch.Tensor, scales: torch.Tensor | None, pages: torch.Tensor, kv_len: int) -> torch.Tensor:
    """[kv_len, Hk, D] float32: what the first kv_len tokens on these pages stand for."""
    # Slicing to kv_len before any arithmetic is what keeps garbage in the last page's tail out of the result.
    tokens = cached[pages].flatten(0, 1)[:kv_len].float()
    if scales is None:
        return tokens
    return tokens * scales.transpose(1, 2)[pages].flatten(0, 1)[:kv_len, :, None]


def _turned(x: torch.Tensor, positions: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    assert options.rope_table is not None
    cos, sin = options.rope_table[positions.abs()].unbind(-1)
    return rotate(x, cos, torch.where(positions[:, None] < 0, -sin, sin), options.rope_interleaved)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    visible: torch.Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    kv_len = key.shape[0]
    key, value = (tensor.repeat_interleave(plan.group, dim=1) for tensor in (key, value))
    logits = torch.einsum("qhd,khd->hqk", query, key) * options.sm_scale
    if options.soft_cap > 0:
        logits = options.soft_cap * torch.tanh(logits / options.soft_cap)
    if options.alibi_slopes is not None:
        distance = torch.arange(kv_len, device=query.device) - positions[:, None]
        logits = logits + options.alibi_slopes[:, None, None] * distance
    logits = logits.masked_fill(~visible, -torch.inf)
    highest = logits.amax(dim=-1) if kv_len else logits.new_full(logits.shape[:2], -torch.inf)
    if options.sinks is not None:
        highest = torch.maximum(highest, options.sinks[:, None])
    base = highest.masked_fill(highest == -torch.inf, 0.0)
    exp = torch.exp if options.exp_table is None else options.exp_table.exp
    weights = exp(logits - base[..., None])
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
