"""Scales with one factor a head, as FlashInfer takes them with queries and pages of 8 bits."""

from __future__ import annotations

import torch

from .arguments import Scale

__all__ = ["by_head", "is_by_head"]


def is_by_head(*scales: Scale) -> bool:
    """True where any has more than one element."""
    return any(isinstance(scale, torch.Tensor) and scale.numel() > 1 for scale in scales)


def by_head(name: str, scale: Scale, num_heads: int, repeats: int, device: torch.device) -> torch.Tensor:
    """[num_heads * repeats, 1] float32: the factor of each query head, of which `repeats` share one of the scale's.

    Raises: ValueError for other than 1 or num_heads elements.
    """
    factors = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32, device=device).flatten()
    if factors.numel() not in (1, num_heads):
        raise ValueError(f"{name} must have 1 or {num_heads} elements (one a head), got {factors.numel()}.")
    return factors.expand(num_heads).repeat_interleave(repeats)[:, None]
