"""mla_attention on the native core (csrc/paged_attention.cpp): paged attention whose keys have two parts."""

from __future__ import annotations

import torch

from ..attention_options import AttentionOptions
from ..attention_plan import AttentionPlan
from ..pages import mark_written
from .native import core

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
    core().mla_attention(
        q_latent,
        q_rope,
        latent_pages,
        rope_pages,
        plan.query_indptr,
        plan.page_indptr,
        plan.page_indices,
        plan.seq_lens,
        plan.work,
        plan.causal,
        plan.window_left,
        options.sm_scale,
        plan.custom_mask,
        plan.mask_indptr,
        out,
        lse,
        torch.get_num_threads(),
    )
    mark_written(out)
