"""What the compile tests compile: a kernel as a launcher would specialise it, without a GPU to launch it on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Variant"]


class Variant(NamedTuple):
    """One specialisation of a kernel.

    signature:  parameter to Triton type ("*bf16", "i32", "i64", "fp32"), all but constexprs.
    constexprs: parameter to value; None for a pointer that is absent.
    aligned:    parameters that a launcher would find divisible by 16: addresses, and strides that are.
    left_out:   target ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942") to the reason why it is not compiled for it.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 2
    left_out: Mapping[str, str] = {}
