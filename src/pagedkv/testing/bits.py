"""Bitwise comparison: moves keep every bit, those of NaN included."""

from __future__ import annotations

import torch

__all__ = ["same_bits", "storage_bytes"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True when shape, dtype and every bit agree; NaN equals itself, 0.0 and -0.0 differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def storage_bytes(*tensors: torch.Tensor) -> torch.Tensor:
    """A copy of all bytes under the tensors, also of those that the views leave out: for "nothing else was written"."""
    views = [torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()) for t in tensors]
    return torch.cat(views)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel():
        # An empty tensor may have any strides, and torch gives no view of some of them.
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return tensor.detach().contiguous().flatten().view(torch.uint8)
