"""The work of an attention plan on the native core (csrc/plan_attention.cpp)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch

from .native import core, unavailable

__all__ = ["divide_attention"]


def divide_attention(
    query_indptr: torch.Tensor,
    page_indptr: torch.Tensor,
    page_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    causal: bool,
    window_left: int,
) -> torch.Tensor | None:
    """Items for the threads of torch, [n] int64, dearest first; None where the core cannot run.

    Rule:   keys are cut at multiples of 256 tokens, whatever the batch, so the cut never changes a result. Chunks whose
            pages several sequences of few query rows have in common are read once for all of them.
    """
    plan = _native_plan() if query_indptr.device.type == "cpu" else None
    if plan is None:
        return None
    work = plan(
        query_indptr,
        page_indptr,
        page_indices,
        seq_lens,
        page_size,
        num_q_heads,
        num_kv_heads,
        causal,
        window_left,
        torch.get_num_threads(),
    )
    return cast(torch.Tensor, work)


@functools.cache
def _native_plan() -> Callable[..., object] | None:
    """Looked up once: a plan is made at every step."""
    return None if unavailable() is not None else cast(Callable[..., object], core().plan_attention)
