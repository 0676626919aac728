"""Rows of keys or values as float8 with one scale each, by the operator library's rule."""

from __future__ import annotations

import torch

__all__ = ["Float8Scratch", "quantize_rows"]

_LARGEST = 448.0
_Part = tuple[tuple[int, ...], torch.dtype]


class Float8Scratch:
    """What quantising takes besides its results: the rows as float32 and a few numbers a row."""

    __slots__ = ("is_zero", "largest", "low", "rows")

    def __init__(self, rows: torch.Tensor, low: torch.Tensor, is_zero: torch.Tensor, largest: torch.Tensor) -> None:
        self.rows, self.low, self.is_zero, self.largest = rows, low, is_zero, largest

    @staticmethod
    def parts(num_tokens: int, num_heads: int, most_dims: int) -> list[_Part]:
        """Shapes and dtypes of the arguments."""
        per_row = (num_tokens, num_heads)
        return [
            ((num_tokens * num_heads * most_dims,), torch.float32),
            (per_row, torch.float32),
            (per_row, torch.bool),
            ((1,), torch.float32),
        ]


def quantize_rows(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, scratch: Float8Scratch) -> None:
    """Fills codes [T, H, D] float8_e4m3fn and scales [T, H] float32 from x [T, H, D]; allocates nothing.

    Rule: scale = amax / 448, 1 for a row of zeros; code = x * (1 / scale), in float32, rounded to nearest, ties to
          even. Not saturating: what would round beyond 448, and NaN, becomes NaN. This is not the rule of
          `quantize_kv`, which divides by the scale and keeps it normal.
    """
    if not x.shape[2]:
        scales.fill_(1.0)
        return
    rows, low = scratch.rows[: x.numel()].view(x.shape), scratch.low
    rows.copy_(x)
    torch.aminmax(rows, dim=-1, out=(low, scales))
    torch.maximum(scales, low.neg_(), out=scales)
    torch.logical_not(scales, out=scratch.is_zero)
    # By a tensor: by a number, torch multiplies with the reciprocal on some devices, which rounds twice.
    torch.div(scales, scratch.largest.fill_(_LARGEST), out=scales)
    scales.masked_fill_(scratch.is_zero, 1.0)
    torch.reciprocal(scales, out=low)
    rows.mul_(low.unsqueeze(-1))
    # Finite products round to 448 at most; torch's own conversion turns infinity into NaN or 448, by its version.
    rows.nan_to_num_(nan=torch.nan, posinf=torch.nan, neginf=torch.nan)
    codes.copy_(rows)
