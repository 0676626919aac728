"""Plans over page tables, for the attention op."""

from __future__ import annotations

from .plan import plan_attention

__all__ = ["plan_attention"]
