"""Plans over page tables, and the wrappers of the attention op that take several."""

from __future__ import annotations

from .cascade import cascade_attention
from .plan import plan_attention
from .plan_buffers import AttentionPlanBuffers
from .tile_attention import tile_attention

__all__ = ["AttentionPlanBuffers", "cascade_attention", "plan_attention", "tile_attention"]
