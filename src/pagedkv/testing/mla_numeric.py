"""What latent attention should give, in float64: attention whose one key head is latent and rope key, side by side.

How far a result may be off is the rule of `testing/numeric.py`.
"""

from __future__ import annotations

import torch

from ..kernels.attention_plan import AttentionPlan
from ..kernels.merge_states import AttentionState
from .numeric import assert_close_to_oracle, attention_oracle

__all__ = ["assert_mla_close", "mla_oracle"]


def mla_oracle(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    plan: AttentionPlan,
    *,
    sm_scale: float,
    arithmetic: torch.dtype = torch.float64,
) -> AttentionState:
    """Latent attention of one sequence and one head at a time; shares no code with any back end.

    Shapes: as `pagedkv.mla_attention`; the result is in `arithmetic`.
    """
    query = q_latent if q_rope is None else torch.cat([q_latent, q_rope], 2)
    key_pages = latent_pages if rope_pages is None else torch.cat([latent_pages, rope_pages], 2)
    pages = key_pages[:, :, None], latent_pages[:, :, None]
    return attention_oracle(query, *pages, plan, sm_scale=sm_scale, arithmetic=arithmetic)


def assert_mla_close(
    actual: AttentionState,
    q_latent: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    plan: AttentionPlan,
    *,
    sm_scale: float,
) -> None:
    """Asserts out and lse of a `mla_attention(..., return_lse=True)` with these arguments."""
    arguments = (q_latent, q_rope, latent_pages, rope_pages, plan)
    exact = mla_oracle(*arguments, sm_scale=sm_scale)
    plain = mla_oracle(*arguments, sm_scale=sm_scale, arithmetic=torch.float32)
    assert_close_to_oracle("out", actual.out, exact.out, plain.out)
    assert_close_to_oracle("lse", actual.lse, exact.lse, plain.lse)
