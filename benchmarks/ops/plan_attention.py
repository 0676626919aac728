"""plan_attention of a decode step, page tables at hand: what an engine pays once a step, on top of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..case import OURS, Case, CaseSpec, Options
from ..paged_kv import KV, PAGE_SIZE
from ..ragged_decode import Heads, RaggedDecode

__all__ = ["cases"]

# Sequences, pages that all of them share, pages of their own.
_SHAPES = ((32, 0, 64), (1024, 0, 64), (1024, 90, 1))
# A plan does not look at the width of a head: narrow ones make the check quick.
_HEADS = Heads(32, 8, 8)
_REPEATS = 10


def cases(options: Options) -> Iterator[CaseSpec]:
    """A few sequences, many, and many on one prompt; all of them are quick."""
    for num_seqs, num_common, num_own in _SHAPES:
        name = f"S{num_seqs}-common{num_common}-own{num_own}-P{PAGE_SIZE}"
        yield CaseSpec("plan_attention", name, partial(_build, num_seqs, num_common, num_own, options.layout))


def _build(num_seqs: int, num_common: int, num_own: int, layout: str) -> Case:
    ids = torch.randperm(num_common + num_seqs * num_own)
    common, own = ids[:num_common], ids[num_common:].view(num_seqs, num_own)
    rows = torch.cat([common.expand(num_seqs, -1), own], 1)
    kv_lens = [rows.shape[1] * PAGE_SIZE - 5] * num_seqs
    query = torch.randn(num_seqs, _HEADS.num_q_heads, _HEADS.head_dim)
    pages = KV(_overlapping_pages(len(ids), layout), _overlapping_pages(len(ids), layout))
    batch = RaggedDecode(_HEADS, rows.tolist(), kv_lens, query, [pages], layout)

    def ours(i: int) -> None:
        for _ in range(_REPEATS):
            batch.planned()

    return Case({OURS: ours}, lambda: batch.check((0, num_seqs // 2, num_seqs - 1)), repeats=_REPEATS)


def _overlapping_pages(num_pages: int, layout: str) -> torch.Tensor:
    """[N, P, Hk, D] ("HND": [N, Hk, P, D]) where page n is page n - 1 moved on by a token: many in few bytes."""
    heads, dim = _HEADS.num_kv_heads, _HEADS.head_dim
    tokens = torch.randn(num_pages + PAGE_SIZE, heads, dim)
    pages = tokens.as_strided((num_pages, PAGE_SIZE, heads, dim), (heads * dim, heads * dim, dim, 1))
    return pages if layout == "NHD" else pages.transpose(1, 2)
