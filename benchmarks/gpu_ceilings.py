"""What a GPU does at most, measured in the rounds of the figures that are held against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["GpuCeilings", "GpuProbe", "Kind"]

Kind = Literal["read", "copy", "matmul"]


@dataclass(frozen=True)
class GpuProbe:
    """run(i) does `work` bytes or operations; a copied byte counts twice, read and written."""

    name: str
    run: Callable[[int], object]
    work: int
    unit: Literal["GB/s", "TFLOP/s"]


class GpuCeilings:
    """The probes of one device; their memory is taken when first asked for."""

    def __init__(self, device: torch.device, tiny: bool = False) -> None:
        self._device, self._tiny = device, tiny
        self._made: dict[Kind, GpuProbe] = {}

    def probe(self, kind: Kind) -> GpuProbe:
        """That of a kind, the same for all cases."""
        if kind not in self._made:
            self._made[kind] = {"read": self._read, "copy": self._copy, "matmul": self._matmul}[kind]()
        return self._made[kind]

    def _read(self) -> GpuProbe:
        from .gpu_read_kernel import BLOCK, read_kernel  # imports Triton, of which a dry run needs the interpreter

        num_bytes = 1 << 16 if self._tiny else 1 << 30
        source = torch.ones(num_bytes // 4, dtype=torch.int32, device=self._device)
        num_blocks = num_bytes // 4 // BLOCK

        def runs(programs: int) -> Callable[[int], object]:
            sums = torch.zeros(programs, dtype=torch.int32, device=self._device)

            def run(i: int) -> object:
                return read_kernel[(programs,)](source, sums, num_blocks, programs, BLOCK=BLOCK, num_warps=8)

            run(0)
            if int(sums.sum()) != num_bytes // 4:
                raise AssertionError(f"the read probe must sum {num_bytes // 4} ones, got {int(sums.sum())}.")
            return run

        # What reads fastest is the ceiling: two programs a multiprocessor fit at a time.
        multiprocessors = 1 if self._tiny else self._num_multiprocessors()
        candidates = [runs(each * multiprocessors) for each in ((2,) if self._tiny else (2, 4, 8))]
        run = candidates[0] if self._tiny else min(candidates, key=_milliseconds)
        return GpuProbe("a kernel that reads 1 GiB", run, num_bytes, "GB/s")

    def _num_multiprocessors(self) -> int:
        return int(torch.cuda.get_device_properties(self._device).multi_processor_count)

    def _copy(self) -> GpuProbe:
        num_bytes = 1 << 16 if self._tiny else 1 << 30
        source = torch.ones(num_bytes // 4, device=self._device)
        target = torch.empty_like(source)
        return GpuProbe("copy_ of 1 GiB", lambda i: target.copy_(source), 2 * num_bytes, "GB/s")

    def _matmul(self) -> GpuProbe:
        """Of random numbers: of zeros a GPU takes less power, and is faster."""
        dim = 32 if self._tiny else 8192
        left, right = (torch.randn(dim, dim, device=self._device).to(torch.bfloat16) for _ in range(2))
        out = torch.empty_like(left)
        return GpuProbe("bf16 matmul of 8192", lambda i: torch.mm(left, right, out=out), 2 * dim**3, "TFLOP/s")


def _milliseconds(run: Callable[[int], object]) -> float:
    """Of twenty in a row, after as many: a rough figure, to choose by."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(40):
        if i == 20:
            start.record()
        run(i)
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))
