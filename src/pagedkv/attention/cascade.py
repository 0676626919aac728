"""Attention over keys that are named level by level: what all sequences share first, what each has alone last."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.attention_plan import AttentionPlan
from ..kernels.merge_states import AttentionState, merge_states
from ..kernels.paged_attention import paged_attention

__all__ = ["cascade_attention"]

# What the plans of all levels agree in: they are of the same query rows over the same pages.
_COMMON = ("num_tokens", "num_q_heads", "num_kv_heads", "head_dim", "value_dim", "page_size")


def cascade_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plans: Sequence[AttentionPlan],
    *,
    layout: str = "NHD",
    sm_scale: float | None = None,
    soft_cap: float = 0.0,
    key_scales: float | torch.Tensor | None = None,
    value_scales: float | torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | AttentionState:
    """Attention of T rows over the keys of several levels, each level read through a plan of its own.

    Shapes: query [T, Hq, D]; key_pages [N, P, Hk, D]; value_pages [N, P, Hk, Dv] ("HND": [N, Hk, P, D]); the result
            [T, Hq, Dv] in the dtype of query; with return_lse AttentionState(out, lse), lse [T, Hq] float32, natural
            logarithm.
    Levels: every plan is over all T rows in the same order, cut into sequences as suits the level: a prefix that all
            share is one sequence of T rows, made with causal=False; prefixes of groups are one sequence a group; what
            each sequence has alone, its new tokens included, is the last level, causal.
    Rule:   a row sees the union of what each level shows it; levels must name disjoint keys. Causal, window and mask
            are those of each plan, whose positions begin at its own level's first key. So what follows positions over
            levels (ALiBi, rotation by the kernel) or counts once over all keys (sinks) is not offered here.
            Levels are merged in order, in float32, and rounded once. Scales are those of `paged_attention`.
    When:   `paged_attention` finds shared pages by itself where its back end can. Name the levels where it cannot: on
            other back ends, or for one copy of a prefix that the page tables of the sequences do not name.
    Raises: ValueError, TypeError for no plan, for plans that do not agree in T, heads, dims or page size, and for what
            `paged_attention` refuses.
    Source: composable formats, FlashInfer (arXiv 2501.01005); Hydragen (arXiv 2402.05099).

    >>> pages = torch.randn(2, 8, 16, 1, 8)
    >>> heads = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    >>> prefix = PageTable.from_rows([[0, 1, 2]], seq_lens=[48], page_size=16)
    >>> own = PageTable.from_rows([[3], [4]], seq_lens=[5, 9], page_size=16)
    >>> shared = plan_attention(torch.tensor([0, 2], dtype=torch.int32), prefix, causal=False, **heads)
    >>> alone = plan_attention(torch.tensor([0, 1, 2], dtype=torch.int32), own, **heads)
    >>> cascade_attention(torch.randn(2, 2, 8), *pages, [shared, alone]).shape
    torch.Size([2, 2, 8])
    """
    _check_plans(plans)
    first = plans[0]
    # One array for all levels, so that no result is copied to be merged.
    values = torch.empty(
        (len(plans), first.num_tokens, first.num_q_heads, first.value_dim),
        dtype=torch.float32,
        device=first.query_indptr.device,
    )
    lses = []
    for plan, out in zip(plans, values, strict=True):
        state = paged_attention(
            query,
            key_pages,
            value_pages,
            plan,
            layout=layout,
            sm_scale=sm_scale,
            soft_cap=soft_cap,
            key_scales=key_scales,
            value_scales=value_scales,
            return_lse=True,
            out=out,
            out_dtype=torch.float32,
            backend=backend,
        )
        assert isinstance(state, AttentionState)
        lses.append(state.lse)
    merged = merge_states(values.transpose(0, 1), torch.stack(lses, 1), backend=backend)
    result = merged.out.to(query.dtype)
    return AttentionState(result, merged.lse) if return_lse else result


def _check_plans(plans: Sequence[AttentionPlan]) -> None:
    if not isinstance(plans, Sequence):
        raise TypeError(f"plans must be a sequence of AttentionPlan, one a level, got {type(plans).__name__}.")
    for level, plan in enumerate(plans):
        if not isinstance(plan, AttentionPlan):
            raise TypeError(
                f"plans must hold an AttentionPlan a level, got {type(plan).__name__} at level {level}. "
                "Build it with plan_attention."
            )
        for name in _COMMON:
            expected, value = getattr(plans[0], name), getattr(plan, name)
            if value != expected:
                raise ValueError(
                    f"plans must have the {name} of level 0, {expected}, got {value} at level {level}. "
                    "Each level is over the same query rows and pages."
                )
    if not plans:
        raise ValueError("plans must hold at least one level, got none.")
