"""What this integration raises when a model does not fit."""

from __future__ import annotations

__all__ = ["UnsupportedModelError"]


class UnsupportedModelError(ValueError):
    """The model's attention needs something that pages of keys and values do not give; the message names it."""
