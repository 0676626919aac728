"""What launchers ask of Triton and of the device. Imported before any kernel, so that interpreted ones are right."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from . import interpreter

__all__ = ["IS_INTERPRETED", "checks_bounds", "has_e4m3", "num_multiprocessors", "on_device", "target_of"]

# What `import triton` found, which the environment may have changed since.
IS_INTERPRETED = isinstance(tl.max, InterpretedFunction)

if IS_INTERPRETED:
    interpreter.install()


def checks_bounds() -> bool:
    """Whether slots and page ids are read back and checked before a launch: where that is free, and where asked for.

    On a GPU only with PAGEDKV_DEBUG=1, since it waits for the device, and not while a graph is captured; otherwise a
    slot or a page id that is out of range is skipped by the kernel, which never reads or writes outside of the pages.
    """
    if IS_INTERPRETED:
        return True
    return os.environ.get("PAGEDKV_DEBUG") == "1" and not torch.cuda.is_current_stream_capturing()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: makes it that of `tensor`."""
    return nullcontext() if IS_INTERPRETED else torch.cuda.device(tensor.device)


@functools.cache
def target_of(device: torch.device) -> str:
    """What kernels are compiled for, such as "cuda:90" or "hip:gfx942"; "interpreted" where they are not compiled."""
    if IS_INTERPRETED:
        return "interpreted"
    with torch.cuda.device(device):
        target = triton.runtime.driver.active.get_current_target()
    return f"{target.backend}:{target.arch}"


def has_e4m3(target: str) -> bool:
    """Whether the hardware converts float8_e4m3fn: NVIDIA from 8.9 on."""
    backend, _, architecture = target.partition(":")
    return backend == "cuda" and int(architecture) >= 89


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 4 where they are interpreted."""
    return 4 if IS_INTERPRETED else int(torch.cuda.get_device_properties(device).multi_processor_count)
