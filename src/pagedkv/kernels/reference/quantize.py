"""quantize_kv in plain torch: the specification."""

from __future__ import annotations

import torch

__all__ = ["quantize_kv"]

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize_kv(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Fills values and scales, both contiguous, the first in the dtype to quantise to; everything is checked."""
    rows = x.float()
    amax = rows.abs().amax(dim=-1) if x.shape[-1] else torch.zeros_like(scales)
    is_finite = amax.isfinite()
    # A tensor, not a number: by a number, torch multiplies with the reciprocal on some devices, which rounds twice.
    largest = torch.full_like(amax, _LARGEST[values.dtype])
    # Not subnormal: with such a scale quotients would go far beyond the largest value, and devices that flush it fail.
    scale = torch.where(amax == 0, 1.0, (amax / largest).clamp(min=_SMALLEST_SCALE))
    quotient = torch.where(is_finite[..., None], rows / scale[..., None], 0.0)
    values.copy_(quotient.round() if values.dtype == torch.int8 else quotient)
    scales.copy_(torch.where(is_finite, scale, torch.nan))
