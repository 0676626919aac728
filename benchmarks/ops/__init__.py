"""The registry: one file an op, each with `cases(options)`."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import CaseSpec, Options
from . import (
    attention_decode,
    attention_mla,
    attention_prefill,
    attention_shared_prefix,
    attention_skewed,
    compare_key,
    copy_pages,
    gather_kv,
    merge_states,
    paged_caching,
    plan_attention,
    prefix_cache,
    softmax_table,
    store_kv,
    store_kv_quantized,
    tile_cache,
)

__all__ = ["all_cases"]

_OPS = (
    attention_decode,
    attention_prefill,
    attention_mla,
    attention_shared_prefix,
    attention_skewed,
    softmax_table,
    plan_attention,
    store_kv,
    store_kv_quantized,
    paged_caching,
    gather_kv,
    copy_pages,
    merge_states,
    compare_key,
    prefix_cache,
    tile_cache,
)


def all_cases(options: Options) -> Iterator[CaseSpec]:
    """Every case, op by op."""
    for op in _OPS:
        yield from op.cases(options)
