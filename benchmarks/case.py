"""What one measurement is: who runs, what must be done at least, and how it is shown to be right first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

__all__ = [
    "MAX_ROUNDS",
    "OURS",
    "Case",
    "CaseSpec",
    "Ceiling",
    "Options",
    "WrongResultError",
    "dtype_label",
    "rotations",
]

OURS = "pagedkv"
Run = Callable[[int], object]

MAX_ROUNDS = 60
_ROTATED_BYTES = 256 << 20
_LABELS = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "e4m3",
}


class WrongResultError(Exception):
    """An op gave a wrong result; it is not timed."""


@dataclass(frozen=True)
class Options:
    """What the command line says to the cases."""

    layout: Literal["NHD", "HND"] = "NHD"
    quick: bool = False


@dataclass(frozen=True)
class Ceiling:
    """What the machine does at most, and how much of it the op must do, which takes work / rate.

    kind: the probe that measures the rate (`benchmarks/ceilings.py`).
    work: bytes read ("read"), bytes copied, counted once ("copy"), multiplications and additions ("matmul").
    """

    kind: Literal["read", "copy", "matmul"]
    work: int


@dataclass(frozen=True)
class Case:
    """One op on one shape, ready to run.

    contenders: name -> run(i); i counts the rounds, so that each round can use other memory. OURS is one of them.
    check:      raises WrongResultError when ours is wrong.
    ceilings:   the one that takes longest is the floor under all contenders; the rate of the first is shown.
    num_bytes:  of a case without ceilings, the bytes of its rate; 0 for none.
    repeats:    calls inside one run, for ops of microseconds.
    """

    contenders: Mapping[str, Run]
    check: Callable[[], None]
    ceilings: Sequence[Ceiling] = ()
    num_bytes: int = 0
    repeats: int = 1


@dataclass(frozen=True)
class CaseSpec:
    """A case by name; `build` takes its memory only when its turn comes."""

    op: str
    shape: str
    build: Callable[[], Case] = field(repr=False)

    @property
    def name(self) -> str:
        """What --only looks in."""
        return f"{self.op}/{self.shape}"


def dtype_label(dtype: torch.dtype) -> str:
    """f32, f16, bf16, int8, e4m3."""
    return _LABELS[dtype]


def rotations(num_bytes: int) -> int:
    """How many copies of memory make a rotation too large for any cache, or one for every round."""
    return min(-(-_ROTATED_BYTES // max(1, num_bytes)), MAX_ROUNDS)
