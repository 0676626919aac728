"""paged_attention with its exponentials from a table, beside the exact ones: whether the table is worth it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import pagedkv
from pagedkv.testing.numeric import table_errors

from ..case import OURS, Case, CaseSpec, Options, WrongResultError
from ..paged_batch import BatchShape, PagedBatch

__all__ = ["cases"]

# S, new tokens, context: one decode step and one prompt
_SHAPES = ((32, 1, 1024), (1, 2048, 2048))


def cases(options: Options) -> Iterator[CaseSpec]:
    """Heads 32/8 of 128, float32 pages."""
    for num_seqs, q_len, context in _SHAPES[:1] if options.quick else _SHAPES:
        shape = BatchShape(num_seqs, q_len, context, 32, 8, 128, torch.float32)
        name = f"S{num_seqs}-T{q_len}-ctx{context}-Hq32-Hk8-D128-f32"
        yield CaseSpec("softmax_table", name, partial(_build, shape, options.layout))


def _build(shape: BatchShape, layout: str) -> Case:
    batch = PagedBatch(shape, layout)

    def by_table(i: int) -> torch.Tensor:
        pages = batch.pages[i % len(batch.pages)]
        out = pagedkv.paged_attention(batch.query, pages.key, pages.value, batch.plan, layout=layout, softmax="lut")
        assert isinstance(out, torch.Tensor)  # no LSE was asked for
        return out

    def check() -> None:
        allowed = table_errors("lut", batch.pages[0].value, None).out
        error = float((by_table(0) - batch.run(0)).abs().max())
        if not error <= 2 * allowed:
            raise WrongResultError(f"the table moves the result by {error:.3g}, more than its bound of {allowed:.3g}")

    exact = {"exact softmax": lambda i: batch.run(batch.far_from(i))}
    return Case({OURS: by_table, **exact}, check, shape.ceilings)
