"""What one measurement is: who runs, what work it is, and how it is shown to be right first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
Ceiling = Literal["read", "copy", "matmul", "none"]
Run = Callable[[int], object]

MAX_ROUNDS = 60
_ROTATED_BYTES = 256 << 20
_LABELS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class WrongResultError(Exception):
    """An op gave a wrong result; it is not timed."""


@dataclass(frozen=True)
class Options:
    """What the command line says to the cases."""

    layout: Literal["NHD", "HND"] = "NHD"
    quick: bool = False


@dataclass(frozen=True)
class Case:
    """One op on one shape, ready to run.

    contenders: name -> run(i); i counts the rounds, so that each round can use other memory. OURS is one of them.
    check:      raises WrongResultError when ours is wrong.
    num_bytes:  bytes that the op must move (read: bytes read; copy: bytes copied, counted once).
    repeats:    calls inside one run, for ops of microseconds.
    """

    contenders: Mapping[str, Run]
    check: Callable[[], None]
    ceiling: Ceiling
    num_bytes: int = 0
    num_flops: int = 0
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
    """f32, f16, bf16."""
    return _LABELS[dtype]


def rotations(num_bytes: int) -> int:
    """How many copies of memory make a rotation too large for any cache, or one for every round."""
    return min(-(-_ROTATED_BYTES // max(1, num_bytes)), MAX_ROUNDS)
