"""apply_rope in plain torch: the specification."""

from __future__ import annotations

import torch

from ..rope import RotaryEmbedding

__all__ = ["apply_rope", "cos_sin", "rotate"]


def apply_rope(x: torch.Tensor, positions: torch.Tensor, rope: RotaryEmbedding, out: torch.Tensor) -> None:
    """Fills out; everything is checked."""
    out.copy_(rotate(x.float(), *cos_sin(positions, rope), rope.interleaved))


def cos_sin(positions: torch.Tensor, rope: RotaryEmbedding) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, n] of the pairs of each token, from the angle itself, not from a table: any int64 may be one."""
    angles = positions.to(torch.float64)[:, None] * rope.inverse_frequencies().to(positions.device)
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [T, H, D] with its first 2 * n columns turned by cos and sin [T, n]."""
    cos, sin = cos[:, None], sin[:, None]
    half = cos.shape[-1]
    turning, still = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (
        (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :half], turning[..., half:])
    )
    # Pairs lie side by side, or all first ones before all second ones.
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1 if interleaved else -2)
    return torch.cat((turned.flatten(-2), still), dim=-1)
