"""paged_attention of sequences that stand on the pages of one prompt, beside the same with a copy of it each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..case import OURS, Case, CaseSpec, Ceiling, Options, WrongResultError, dtype_label, rotations
from ..paged_kv import KV, PAGE_SIZE, random_pages, token_bytes
from ..ragged_decode import Heads, RaggedDecode

__all__ = ["cases"]

_NUM_SEQS, _PREFIX_LEN, _OWN_LEN = 32, 1500, 36
_HEADS = (Heads(32, 32, 128), Heads(32, 8, 128), Heads(9, 3, 64))
_DTYPES = (torch.float32, torch.bfloat16)


def cases(options: Options) -> Iterator[CaseSpec]:
    """Each shape in each dtype."""
    for heads in _HEADS[-1:] if options.quick else _HEADS:
        for dtype in _DTYPES:
            name = f"S{_NUM_SEQS}-common{_PREFIX_LEN}-own{_OWN_LEN}-{heads}-{dtype_label(dtype)}"
            yield CaseSpec("attention_shared_prefix", name, partial(_build, heads, dtype, options.layout))


def _build(heads: Heads, dtype: torch.dtype, layout: str) -> Case:
    query = torch.randn(_NUM_SEQS, heads.num_q_heads, heads.head_dim).to(dtype)
    shared_rows, copied_rows = _rows()
    each = token_bytes(heads.num_kv_heads, heads.head_dim, dtype)
    num_shared = int(shared_rows.max()) + 1
    first = random_pages(num_shared, heads.num_kv_heads, heads.head_dim, dtype, layout)
    _repeat_tail(first, shared_rows, layout)

    def decode(rows: torch.Tensor, pages: KV) -> RaggedDecode:
        count = rotations(pages.key.shape[0] * PAGE_SIZE * each)
        pools = [pages] + [pages.clone() for _ in range(count - 1)]
        return RaggedDecode(heads, rows.tolist(), [_PREFIX_LEN + _OWN_LEN] * _NUM_SEQS, query, pools, layout)

    shared, copied = decode(shared_rows, first), decode(copied_rows, _moved(first, shared_rows, copied_rows))

    def check() -> None:
        shared.check((0, _NUM_SEQS // 2, _NUM_SEQS - 1))
        if not torch.equal(shared.run(0), copied.run(0)):
            raise WrongResultError("results with shared and with copied pages differ in bits")

    num_keys = _NUM_SEQS * (_PREFIX_LEN + _OWN_LEN)
    return Case(
        contenders={OURS: shared.run, f"{OURS}, prefix copied": copied.run},
        check=check,
        # Of a page that is shared, a byte is read once.
        ceilings=[Ceiling("read", num_shared * PAGE_SIZE * each), heads.decode_flops(num_keys)],
    )


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of each sequence: all whole pages of the prefix in common; none in common."""
    num_common = _PREFIX_LEN // PAGE_SIZE
    num_own = -(-(_PREFIX_LEN + _OWN_LEN) // PAGE_SIZE) - num_common
    common, own = torch.randperm(num_common + _NUM_SEQS * num_own).split([num_common, _NUM_SEQS * num_own])
    shared = torch.cat([common.expand(_NUM_SEQS, -1), own.view(_NUM_SEQS, num_own)], 1)
    return shared, torch.randperm(shared.numel()).view(shared.shape)


def _repeat_tail(pages: KV, rows: torch.Tensor, layout: str) -> None:
    """The tokens of the prefix that fill no page stand at the head of each sequence's first own page."""
    first_own = rows[:, _PREFIX_LEN // PAGE_SIZE]
    for tensor in (pages.key, pages.value):
        by_slot = tensor if layout == "NHD" else tensor.transpose(1, 2)
        by_slot[first_own, : _PREFIX_LEN % PAGE_SIZE] = by_slot[first_own[:1], : _PREFIX_LEN % PAGE_SIZE]


def _moved(pages: KV, rows: torch.Tensor, new_rows: torch.Tensor) -> KV:
    """The same tokens on the pages `new_rows`."""
    source = torch.empty(new_rows.numel(), dtype=torch.int64)
    source[new_rows.flatten()] = rows.flatten()
    return KV(pages.key[source], pages.value[source])
