"""paged_attention of one new token a sequence: how near reading the cache comes to reading memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from ..case import OURS, Case, CaseSpec, Options, dtype_label
from ..paged_batch import BatchShape, PagedBatch, check_attention

__all__ = ["cases"]

# S, context, Hq, Hk, D
_SHAPES = (
    (1, 8192, 32, 8, 128),
    (8, 2048, 32, 8, 128),
    (32, 1024, 32, 8, 128),
    (32, 1024, 32, 32, 128),
    (8, 4096, 32, 4, 128),
    (32, 512, 9, 3, 64),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases(options: Options) -> Iterator[CaseSpec]:
    """Each shape in each dtype."""
    for num_seqs, context, q_heads, kv_heads, dim in _SHAPES[-1:] if options.quick else _SHAPES:
        for dtype in _DTYPES:
            shape = BatchShape(num_seqs, 1, context, q_heads, kv_heads, dim, dtype)
            name = f"S{num_seqs}-ctx{context}-Hq{q_heads}-Hk{kv_heads}-D{dim}-{dtype_label(dtype)}"
            yield CaseSpec("attention_decode", name, partial(_build, shape, options.layout))


def _build(shape: BatchShape, layout: str) -> Case:
    batch = PagedBatch(shape, layout)
    query = batch.query_by_head()
    # The query heads of a KV head as rows of one query: torch then reads each key once a group.
    folded = query.reshape(shape.num_seqs, shape.num_kv_heads, -1, shape.head_dim)

    def sdpa(i: int) -> torch.Tensor:
        key, value = batch.contiguous[i % len(batch.contiguous)]
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def sdpa_folded(i: int) -> torch.Tensor:
        key, value = batch.contiguous[i % len(batch.contiguous)]
        return F.scaled_dot_product_attention(folded, key, value)

    def gather_sdpa(i: int) -> torch.Tensor:
        key_pages, value_pages = batch.pages[i % len(batch.pages)]
        return F.scaled_dot_product_attention(folded, batch.gathered(key_pages), batch.gathered(value_pages))

    return Case(
        contenders={
            OURS: batch.run,
            "sdpa, contiguous": sdpa,
            "sdpa folded, contiguous": sdpa_folded,
            "index_select + sdpa": gather_sdpa,
        },
        check=lambda: check_attention(batch, batch.packed(sdpa(0))),
        ceiling="read",
        num_bytes=shape.kv_bytes,
        num_flops=shape.num_flops,
    )
