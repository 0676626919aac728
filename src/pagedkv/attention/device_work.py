"""The part of the Triton back end that cuts batches, which is imported when the first plan for its device asks."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.attention_plan import DeviceWork

__all__ = ["device_work", "triton_module"]


def device_work(tensors: Sequence[torch.Tensor], num_partial_rows: int) -> DeviceWork:
    """From items of the three heights, and merges."""
    few, some, many, merges = tensors
    return DeviceWork(few, some, many, merges, num_partial_rows)


def triton_module(name: str, device: torch.device) -> Any | None:
    """kernels/triton/<name>.py if that back end runs on the device, else None."""
    is_asked = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return _module(name) if is_asked and device.type == _triton_device() else None


@functools.cache
def _triton_device() -> str:
    """The type of device that its kernels run on: the CPU for those that are interpreted."""
    if importlib.util.find_spec("triton") is None:
        return "none"
    return "cpu" if _module("runtime").IS_INTERPRETED else "cuda"


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(f"...kernels.triton.{name}", __name__)
