"""What the machine can do at most, measured in the rounds of the figures that are held against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from pagedkv.kernels.cpu import native

from .case import Ceiling, rotations

__all__ = ["Probe", "probe"]

_READ_BYTES = 1 << 30
_MATMUL_DIM = 2048


@dataclass(frozen=True)
class Probe:
    """run(i) does `work` bytes or operations, `unit` says which; `limit` is what a floor of it is called."""

    name: str
    run: Callable[[int], object]
    work: int
    unit: Literal["bytes", "flops"]
    limit: Literal["memory", "copy", "arithmetic"]


def probe(ceiling: Ceiling) -> Probe:
    """The probe of a ceiling; a copy is measured on as many bytes as the op must move."""
    if ceiling.kind == "read":
        return _read()
    return _matmul() if ceiling.kind == "matmul" else _copy(ceiling.work)


@lru_cache(maxsize=1)
def _read() -> Probe:
    """Reads 1 GiB with torch's threads, by the native core where there is one."""
    memory = torch.zeros(_READ_BYTES // 4)
    if native.unavailable() is None:
        core = native.core()

        def run(i: int) -> object:
            return core.read_bandwidth(memory, torch.get_num_threads())

        return Probe("read 1 GiB", run, _READ_BYTES, "bytes", "memory")
    return Probe("torch.sum over 1 GiB", lambda i: memory.sum(), _READ_BYTES, "bytes", "memory")


@lru_cache(maxsize=1)
def _matmul() -> Probe:
    """A float32 product of torch; half-precision ops are held against it too, since they accumulate in float32."""
    a, b = torch.randn(2, _MATMUL_DIM, _MATMUL_DIM)
    out = torch.empty(_MATMUL_DIM, _MATMUL_DIM)
    flops = 2 * _MATMUL_DIM**3
    return Probe("torch float32 matmul", lambda i: torch.mm(a, b, out=out), flops, "flops", "arithmetic")


def _copy(num_bytes: int) -> Probe:
    """copy_ of as many bytes as the op moves, in two tensors like K and V, into memory that has left the caches."""
    half = max(1, num_bytes // 8)
    sources = [torch.zeros(half), torch.zeros(half)]
    targets = [[torch.zeros(half), torch.zeros(half)] for _ in range(rotations(num_bytes))]

    def run(i: int) -> None:
        for source, target in zip(sources, targets[i % len(targets)], strict=True):
            target.copy_(source)

    return Probe("copy_ of as many bytes", run, 8 * half, "bytes", "copy")
