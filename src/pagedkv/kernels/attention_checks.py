"""Checks that the attention ops share: numbers as kernels compute with them, and where results may be written."""

from __future__ import annotations

import math
import numbers
import operator
import struct
from typing import Any

import torch

__all__ = ["as_float32", "check_contiguous", "check_no_overlap"]


def as_float32(name: str, value: Any) -> float:
    """The value as kernels compute with it; refuses what is not a finite number there."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except (OverflowError, struct.error):
        rounded = math.inf
    if not math.isfinite(rounded):
        raise ValueError(f"{name} must be a finite float32, got {value}.")
    return rounded


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Refuses a strided or negated result: kernels write it as a flat array."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}.")
    # A graph cannot hold the question; it writes `out` by copy_, which knows negated views.
    if not torch.compiler.is_compiling() and tensor.is_neg():
        raise ValueError(f"{name} must hold its values as they are, got a negated view.")


def check_no_overlap(result: str, out: torch.Tensor, /, **inputs: torch.Tensor | None) -> None:
    """Refuses a result of that name in the address range of an input; conservative for strided tensors."""
    start, end = out.data_ptr(), _end(out)
    for name, tensor in inputs.items():
        if tensor is not None and tensor.data_ptr() < end and start < _end(tensor) and start < end:
            raise ValueError(f"{result} must not overlap {name}, got memory that both use. Pass a tensor of its own.")


def _end(tensor: torch.Tensor) -> int:
    """The address after the last element, 0 for a tensor without elements."""
    if not tensor.numel():
        return 0
    strides = tensor.stride()
    last: int = sum(map(operator.mul, tensor.shape, strides)) - sum(strides)
    return tensor.data_ptr() + (last + 1) * tensor.element_size()
