"""merge_states of split attention, beside the same in torch operations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import pagedkv

from ..case import OURS, Case, CaseSpec, Ceiling, Options, dtype_label, rotations
from ..truth import check_error

__all__ = ["cases"]

# T, K, Hq, Dv
_SHAPES = ((32, 8, 32, 128), (512, 2, 32, 128))
_DTYPES = (torch.float32, torch.bfloat16)


def cases(options: Options) -> Iterator[CaseSpec]:
    """A decode split in eight, and a prompt chunk over a cached prefix."""
    for shape in _SHAPES[:1] if options.quick else _SHAPES:
        for dtype in _DTYPES:
            name = "T{}-K{}-Hq{}-Dv{}-".format(*shape) + dtype_label(dtype)
            yield CaseSpec("merge_states", name, partial(_build, shape, dtype))


def _build(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    first = torch.randn(shape).to(dtype)
    num_bytes = first.numel() * first.element_size()
    values = [first.clone() for _ in range(rotations(num_bytes))]
    lse = torch.randn(shape[:3])

    def ours(i: int) -> torch.Tensor:
        return pagedkv.merge_states(values[i % len(values)], lse).out

    def softmax_sum(i: int) -> torch.Tensor:
        states = values[(i + len(values) // 2) % len(values)]
        return (lse.softmax(dim=1)[..., None] * states).sum(dim=1).to(dtype)

    def check() -> None:
        truth = (lse.double().softmax(dim=1)[..., None] * first.double()).sum(dim=1)
        check_error(ours(0), softmax_sum(0), truth)

    return Case({OURS: ours, "torch softmax and sum": softmax_sum}, check, [Ceiling("read", num_bytes)])
