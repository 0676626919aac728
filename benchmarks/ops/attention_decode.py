"""paged_attention of one new token a sequence: how near it comes to reading the cache once, or to its arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from pagedkv.spec import SCALED_DTYPES

from ..case import OURS, Case, CaseSpec, Options, dtype_label
from ..paged_batch import BatchShape, PagedBatch, check_attention

__all__ = ["cases"]

Attend = Callable[[int], torch.Tensor]

# S, context, Hq, Hk, D
_SHAPES = (
    (1, 8192, 32, 8, 128),
    (8, 2048, 32, 8, 128),
    (32, 1024, 32, 8, 128),
    (32, 1024, 32, 32, 128),
    (8, 4096, 32, 4, 128),
    (32, 512, 9, 3, 64),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def cases(options: Options) -> Iterator[CaseSpec]:
    """Each shape with pages of each dtype."""
    for num_seqs, context, q_heads, kv_heads, dim in _SHAPES[-1:] if options.quick else _SHAPES:
        for dtype in _DTYPES:
            shape = BatchShape(num_seqs, 1, context, q_heads, kv_heads, dim, dtype)
            name = f"S{num_seqs}-ctx{context}-Hq{q_heads}-Hk{kv_heads}-D{dim}-{dtype_label(dtype)}"
            yield CaseSpec("attention_decode", name, partial(_build, shape, options.layout))


def _build(shape: BatchShape, layout: str) -> Case:
    batch = PagedBatch(shape, layout)
    peers = _quantized_peers(batch) if shape.dtype in SCALED_DTYPES else _peers(batch)
    first_peer = next(iter(peers.values()))
    by_head = (shape.num_seqs, shape.num_q_heads, 1, shape.head_dim)
    return Case(
        contenders={OURS: batch.run, **peers},
        # Heads folded by group unfold into the same order.
        check=lambda: check_attention(batch, first_peer(0).reshape(by_head)),
        ceilings=shape.ceilings,
    )


def _folded(batch: PagedBatch) -> torch.Tensor:
    """The query heads of a KV head as rows of one query: torch then reads each key once a group."""
    shape = batch.shape
    return batch.query_by_head().reshape(shape.num_seqs, shape.num_kv_heads, -1, shape.head_dim)


def _peers(batch: PagedBatch) -> dict[str, Attend]:
    query, folded = batch.query_by_head(), _folded(batch)

    def sdpa(i: int) -> torch.Tensor:
        kv = batch.contiguous[i % len(batch.contiguous)]
        return F.scaled_dot_product_attention(query, kv.key, kv.value, enable_gqa=True)

    def sdpa_folded(i: int) -> torch.Tensor:
        kv = batch.contiguous[batch.far_from(i) % len(batch.contiguous)]
        return F.scaled_dot_product_attention(folded, kv.key, kv.value)

    def gather_sdpa(i: int) -> torch.Tensor:
        kv = batch.gathered(batch.far_from(i))
        return F.scaled_dot_product_attention(folded, kv.key, kv.value)

    return {"sdpa, contiguous": sdpa, "sdpa folded, contiguous": sdpa_folded, "index_select + sdpa": gather_sdpa}


def _quantized_peers(batch: PagedBatch) -> dict[str, Attend]:
    """Torch has no attention over scaled int8: it needs the numbers first."""
    folded = _folded(batch)

    def numbers_sdpa(i: int) -> torch.Tensor:
        kv = batch.contiguous[i % len(batch.contiguous)]
        return F.scaled_dot_product_attention(folded, *kv.numbers(torch.float32))

    return {"to float32 + sdpa folded": numbers_sdpa}
