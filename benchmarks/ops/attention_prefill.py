"""paged_attention of many new tokens a sequence: how near it comes to a matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from ..case import OURS, Case, CaseSpec, Ceiling, Options, dtype_label
from ..paged_batch import BatchShape, PagedBatch, check_attention

__all__ = ["cases"]

# S, new tokens, context, Hq, Hk, D
_SHAPES = ((1, 2048, 2048, 32, 8, 128), (4, 256, 2304, 32, 8, 128))
_QUICK_SHAPES = ((1, 512, 512, 9, 3, 64),)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases(options: Options) -> Iterator[CaseSpec]:
    """Each shape in each dtype."""
    for num_seqs, q_len, context, q_heads, kv_heads, dim in _QUICK_SHAPES if options.quick else _SHAPES:
        for dtype in _DTYPES:
            shape = BatchShape(num_seqs, q_len, context, q_heads, kv_heads, dim, dtype)
            name = f"S{num_seqs}-q{q_len}-ctx{context}-Hq{q_heads}-Hk{kv_heads}-D{dim}-{dtype_label(dtype)}"
            yield CaseSpec("attention_prefill", name, partial(_build, shape, options.layout))


def _build(shape: BatchShape, layout: str) -> Case:
    batch = PagedBatch(shape, layout)
    query, mask = batch.query_by_head(), batch.mask()

    def attend(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )

    def sdpa(i: int) -> torch.Tensor:
        kv = batch.contiguous[i % len(batch.contiguous)]
        return attend(kv.key, kv.value)

    def gather_sdpa(i: int) -> torch.Tensor:
        kv = batch.gathered(batch.far_from(i))
        return attend(kv.key, kv.value)

    return Case(
        contenders={OURS: batch.run, "sdpa, contiguous": sdpa, "index_select + sdpa": gather_sdpa},
        check=lambda: check_attention(batch, sdpa(0)),
        ceilings=[Ceiling("matmul", shape.num_flops)],
    )
