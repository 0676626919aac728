"""paged_attention on the native core (csrc/paged_attention.cpp)."""

from __future__ import annotations

import torch

from ..attention_plan import AttentionPlan
from ..paged_attention import AttentionOptions
from ..pages import mark_written
from .native import core

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
    table = options.exp_table
    entries, powers = (None, None) if table is None else table.tensors()
    core().paged_attention(
        query,
        key_pages,
        value_pages,
        plan.query_indptr,
        plan.page_indptr,
        plan.page_indices,
        plan.seq_lens,
        plan.work,
        plan.causal,
        plan.window_left,
        options.sm_scale,
        options.soft_cap,
        options.value_scale,
        options.sinks,
        options.alibi_slopes,
        plan.custom_mask,
        plan.mask_indptr,
        options.key_scales,
        options.value_scales,
        options.rope_table,
        options.rope_interleaved,
        entries,
        powers,
        0.0 if table is None else table.num_steps / table.max_distance,
        out,
        lse,
        torch.get_num_threads(),
    )
    mark_written(out)
