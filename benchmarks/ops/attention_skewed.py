"""paged_attention of one long sequence among short ones, beside the same number of tokens spread evenly."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..case import OURS, Case, CaseSpec, Ceiling, Options, dtype_label
from ..paged_kv import PAGE_SIZE, random_pages, token_bytes
from ..ragged_decode import Heads, RaggedDecode

__all__ = ["cases"]

# Tokens of the long sequence; number and tokens of the short ones.
_LENGTHS = (65536, 63, 256)
_QUICK_LENGTHS = (4096, 15, 256)
_HEADS = Heads(32, 8, 128)
_DTYPES = (torch.float32, torch.bfloat16)


def cases(options: Options) -> Iterator[CaseSpec]:
    """The skew in each dtype."""
    long, num_short, short = _QUICK_LENGTHS if options.quick else _LENGTHS
    for dtype in _DTYPES:
        name = f"1x{long}-{num_short}x{short}-{_HEADS}-{dtype_label(dtype)}"
        lens = [long, *[short] * num_short]
        yield CaseSpec("attention_skewed", name, partial(_build, lens, dtype, options.layout))


def _build(skewed_lens: list[int], dtype: torch.dtype, layout: str) -> Case:
    num_seqs, num_tokens = len(skewed_lens), sum(skewed_lens)
    even_lens = [(num_tokens + seq) // num_seqs for seq in range(num_seqs)]
    query = torch.randn(num_seqs, _HEADS.num_q_heads, _HEADS.head_dim).to(dtype)
    num_pages = max(sum(_num_pages(lens)) for lens in (skewed_lens, even_lens))
    # One pool for all rounds: it is larger than the caches, and the read probe touches four times as much or more.
    pool = random_pages(num_pages, _HEADS.num_kv_heads, _HEADS.head_dim, dtype, layout)

    def decode(lens: list[int]) -> RaggedDecode:
        counts = _num_pages(lens)
        rows = torch.randperm(num_pages)[: sum(counts)].split(counts)
        return RaggedDecode(_HEADS, [row.tolist() for row in rows], lens, query, [pool], layout)

    skewed, even = decode(skewed_lens), decode(even_lens)

    def check() -> None:
        for batch in (skewed, even):
            batch.check((0, num_seqs - 1))

    num_bytes = num_tokens * token_bytes(_HEADS.num_kv_heads, _HEADS.head_dim, dtype)
    return Case(
        contenders={OURS: skewed.run, f"{OURS}, even": even.run},
        check=check,
        ceilings=[Ceiling("read", num_bytes), _HEADS.decode_flops(num_tokens)],
    )


def _num_pages(lens: list[int]) -> list[int]:
    return [-(-kv_len // PAGE_SIZE) for kv_len in lens]
