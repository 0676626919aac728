"""Arrays of the host on a device, without waiting for what the device still computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["aligned_offsets", "uploaded", "uploaded_together"]

# Elements of int32 between the starts of parts: 64 bytes, so that kernels read every part in whole vectors.
_ALIGNMENT = 16


def uploaded(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor; on the CPU it shares the bytes, elsewhere it is a copy of what they are now.

    A copy from pinned memory is queued and not waited for; torch keeps that memory until it is over.
    """
    if device.type == "cpu":
        return torch.from_numpy(array)
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def uploaded_together(arrays: Sequence[npt.NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """Arrays of int32 in one copy: views of one tensor, but on the CPU, where each shares the bytes of its array."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    offsets = aligned_offsets([array.size for array in arrays])
    packed = torch.empty(offsets[-1], dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    on_host = packed.numpy()
    for array, start in zip(arrays, offsets, strict=False):
        on_host[start : start + array.size] = array.reshape(-1)
    there = packed.to(device, non_blocking=device.type == "cuda")
    return [there[start : start + array.size].view(array.shape) for array, start in zip(arrays, offsets, strict=False)]


def aligned_offsets(sizes: Sequence[int]) -> list[int]:
    """Where parts of so many int32 start in one tensor, and last its size."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return offsets
