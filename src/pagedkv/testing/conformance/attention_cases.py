"""paged_attention: batches of all kinds over pages whose unused slots hold NaN, every option and every two of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from ...attention.plan import plan_attention
from ...kernels.rope import Llama31Scaling, RotaryEmbedding
from ...shapes import dtype_name
from ...storage.page_table import PageTable
from ..attention_batch import AttentionBatch
from .attention_judge import attends, batch_of, fills_out
from .attention_value_cases import attention_value_checks
from .case import ConformanceCase, threads_of_caller
from .option_pairs import option_pairs

__all__ = ["attention_cases"]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
LLAMA31 = RotaryEmbedding(64, 500000.0, llama31=Llama31Scaling(old_context_len=100))

# Situation: new tokens and all tokens of each sequence, and the settings of `attention_batch`.
BATCHES: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "decode": ([1, 1, 1], [40, 7, 1], {}),
    "decode-float16": ([1, 1], [40, 7], {"dtype": F16}),
    "decode-bfloat16-HND": ([1, 1], [40, 7], {"dtype": BF16, "layout": "HND"}),
    "decode-long": ([1, 1], [300, 257], {"num_kv_heads": 1}),
    "decode-1100": ([1, 1, 1], [1100, 1024, 1025], {"num_kv_heads": 1}),
    "decode-1100-float16": ([1, 1], [1100, 700], {"num_kv_heads": 1, "dtype": F16}),
    "decode-1100-bfloat16-HND": ([1, 1], [1100, 700], {"num_kv_heads": 1, "dtype": BF16, "layout": "HND"}),
    "decode-1100-int8": ([1, 1], [1100, 700], {"num_kv_heads": 1, "dtype": I8}),
    "decode-5000": ([1], [5000], {"num_kv_heads": 1}),
    "append-1100": ([5, 2], [1100, 1030], {"num_kv_heads": 1}),
    "append-1100-not-causal": ([5, 2], [1100, 1030], {"num_kv_heads": 1, "causal": False}),
    "window-1100": ([1, 3], [1100, 1100], {"num_kv_heads": 1, "window_left": 600}),
    "rope-1100": ([1, 3], [1100, 600], {"num_kv_heads": 1, "rope": LLAMA31}),
    "alibi-1100": ([1, 3], [1100, 600], {"num_kv_heads": 1, "alibi_slopes": torch.tensor([0.002, -0.002])}),
    "custom-mask-1100": ([3], [1100], {"num_kv_heads": 1, "masked": True}),
    "decode-20-sequences": ([1] * 20, list(range(1, 60, 3)), {}),
    "decode-70-sequences": ([1] * 70, list(range(3, 73)), {"num_kv_heads": 1, "group": 1}),
    "mixed-20-sequences": ([1, 3] * 10, list(range(5, 65, 3)), {"num_kv_heads": 1}),
    "prefill-130": ([130], [130], {"num_kv_heads": 1}),
    "prefill-130-bfloat16": ([130], [130], {"num_kv_heads": 1, "dtype": BF16}),
    "prefill-270": ([270], [270], {"num_kv_heads": 1, "group": 1}),
    "prefill-130-custom-mask": ([130], [140], {"num_kv_heads": 1, "group": 1, "masked": True}),
    "prefill-130-window": ([130], [140], {"num_kv_heads": 1, "group": 1, "window_left": 70}),
    # Of the first sequence no row asks: its pages are there so that the ids of the others go beyond 16 bits.
    "page-ids-past-65535": ([0, 1, 3], [70_000, 40, 30], {"num_kv_heads": 1, "page_size": 1, "head_dim": 16}),
    "decode-group-1": ([1, 1], [20, 9], {"group": 1, "num_kv_heads": 3}),
    "decode-group-8": ([1], [35], {"group": 8, "num_kv_heads": 2}),
    "decode-group-7": ([1, 1], [35, 9], {"group": 7, "num_kv_heads": 2}),
    "decode-group-40": ([1], [35], {"group": 40, "num_kv_heads": 1}),
    "decode-40-heads": ([1], [35], {"group": 1, "num_kv_heads": 40}),
    "decode-128-heads": ([1], [35], {"group": 16, "num_kv_heads": 8}),
    "prefill-40-heads": ([11], [20], {"group": 5, "num_kv_heads": 8}),
    "prefill-40-heads-bfloat16": ([11], [20], {"group": 1, "num_kv_heads": 40, "dtype": BF16}),
    "decode-page-size-1": ([1, 1], [19, 5], {"page_size": 1}),
    "decode-page-size-3": ([1, 1], [19, 5], {"page_size": 3, "group": 3}),
    "page-exactly-full": ([1, 4], [32, 16], {}),
    "page-full-and-one": ([1, 4], [33, 17], {}),
    "append": ([3, 9], [60, 30], {}),
    "prefill": ([37], [37], {"group": 4}),
    "prefill-float16": ([20, 11], [20, 11], {"dtype": F16}),
    "prefill-bfloat16-HND": ([20, 11], [20, 11], {"dtype": BF16, "layout": "HND"}),
    "prefill-not-causal": ([20, 7], [44, 7], {"causal": False}),
    "mixed": ([1, 20, 2, 1], [50, 33, 2, 1], {"num_kv_heads": 3}),
    "sequences-without-rows": ([1, 0, 5, 0], [20, 30, 9, 0], {}),
    "sequences-without-keys": ([5, 2, 12], [2, 0, 0], {}),
    "empty": ([], [], {}),
    "window": ([1, 30], [70, 41], {"window_left": 9}),
    "window-of-one": ([1, 5], [20, 9], {"window_left": 0}),
    "window-not-causal": ([12], [44], {"window_left": 5, "causal": False}),
    "scale": ([1, 12], [40, 20], {"sm_scale": -0.7}),
    "scale-0": ([1, 12], [40, 20], {"sm_scale": 0.0}),
    "large-logits": ([1, 12], [40, 20], {"sm_scale": 200.0}),
    "large-logits-soft-cap": ([1, 12], [40, 20], {"sm_scale": 200.0, "soft_cap": 30.0}),
    "soft-cap": ([1, 12], [40, 20], {"soft_cap": 3.0, "sm_scale": 1.0}),
    "softmax-table": ([1, 12], [40, 20], {"softmax": "lut"}),
    "sinks": ([1, 12], [40, 20], {"sinks": torch.tensor([0.3, 5.0, -math.inf, 2.0])}),
    "sinks-that-outweigh": ([1, 12], [40, 20], {"sinks": torch.tensor([60.0, -60.0, 20.0, 8.0])}),
    "sinks-alone": ([1, 3], [0, 0], {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}),
    "alibi-negative": ([1, 12], [70, 20], {"alibi_slopes": torch.tensor([-0.3, 0.2, -0.01, -1.5])}),
    "alibi": ([1, 12], [70, 20], {"alibi_slopes": torch.tensor([0.3, 0.0, 0.01, 0.1])}),
    "rope": ([1, 12], [40, 20], {"rope": RotaryEmbedding(64)}),
    "rope-interleaved-bfloat16": ([1, 12], [40, 20], {"rope": RotaryEmbedding(64, interleaved=True), "dtype": BF16}),
    "rope-llama31": ([1, 3], [60, 20], {"rope": LLAMA31, "page_size": 3}),
    "rope-partial-interleaved": ([1, 9], [40, 20], {"rope": RotaryEmbedding(24, interleaved=True)}),
    "rope-scaled": ([1, 9], [40, 20], {"rope": RotaryEmbedding(64, scale=4.0)}),
    "rope-128": ([1, 9], [40, 20], {"rope": RotaryEmbedding(128), "head_dim": 128, "dtype": F16}),
    "rope-partial": ([1, 9], [40, 20], {"rope": RotaryEmbedding(24)}),
    "rope-before-the-start": ([7, 9], [3, 0], {"rope": LLAMA31, "causal": False}),
    "float-scales": ([1, 12], [40, 20], {"key_scales": 0.3, "value_scales": -3.0}),
    "int8": ([1, 12], [40, 20], {"dtype": I8}),
    "int8-HND-bfloat16-query": ([1, 12], [40, 20], {"dtype": I8, "query_dtype": BF16, "layout": "HND"}),
    "int8-float-scales": ([1, 12], [40, 20], {"dtype": I8, "key_scales": 0.02, "value_scales": 0.05}),
    "float8_e4m3fn": ([1, 12], [40, 20], {"dtype": E4M3}),
    "float8_e4m3fn-without-scales": ([1, 12], [40, 20], {"dtype": E4M3, "key_scales": None, "value_scales": None}),
    "float8_e5m2": ([1, 12], [40, 20], {"dtype": E5M2}),
    "float8_e4m3fn-HND-float16-query": ([1, 12], [40, 20], {"dtype": E4M3, "query_dtype": F16, "layout": "HND"}),
    "float8_e5m2-bfloat16-query": ([1, 12], [40, 20], {"dtype": E5M2, "query_dtype": BF16}),
    "float8_e4m3fn-128": ([1, 12], [40, 20], {"dtype": E4M3, "query_dtype": BF16, "head_dim": 128}),
    "float32-query-of-bfloat16": ([1, 5], [40, 20], {"dtype": BF16, "query_dtype": F32}),
    "out-bfloat16": ([1, 5], [40, 20], {"out_dtype": BF16, "value_scales": 0.3}),
    "widths-48-24": ([1, 9], [40, 20], {"head_dim": 48, "value_dim": 24}),
    "widths-576-512": ([1], [40], {"head_dim": 576, "value_dim": 512, "num_kv_heads": 1}),
    "widths-7-5": ([1, 9], [40, 20], {"head_dim": 7, "value_dim": 5}),
    "interleaved-pages": ([1, 9], [40, 20], {"form": "interleaved", "value_dim": 24}),
    "page-first-pages": ([1, 9], [40, 20], {"form": "page_first", "layout": "HND"}),
    "sliced-pages": ([1, 9], [40, 20], {"form": "sliced", "page_size": 3}),
    "custom-mask": ([6, 20, 1], [6, 41, 17], {"masked": True}),
    "custom-mask-not-causal": ([6, 20, 1], [6, 41, 17], {"masked": True, "causal": False}),
    "custom-mask-window": ([6, 20, 1], [6, 41, 17], {"masked": True, "causal": False, "window_left": 4}),
    "all-options": (
        [1, 12],
        [70, 20],
        {
            "soft_cap": 5.0,
            "window_left": 30,
            "sinks": torch.tensor([0.3, 5.0, -1.0, 2.0]),
            "alibi_slopes": torch.tensor([0.3, 0.0, 0.01, 0.1]),
        },
    ),
}


# Each with each other: what one option does must not end what another does.
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window_left": 9},
    "custom-mask": {"masked": True},
    "not-causal": {"causal": False},
    "scale": {"sm_scale": 0.7},
    "soft-cap": {"soft_cap": 1.5},
    "softmax-table": {"softmax": "lut"},
    "sinks": {"sinks": torch.tensor([0.3, 5.0, -1.0, 2.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.3, -0.1, 0.01, -0.02])},
    "rope": {"rope": RotaryEmbedding(64, theta=500.0)},
    "float-scales": {"key_scales": 0.3, "value_scales": -3.0},
    "int8": {"dtype": I8},
    "float16": {"dtype": F16},
    "bfloat16": {"dtype": BF16},
    "HND": {"layout": "HND"},
    "page-size-3": {"page_size": 3},
}
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
PAGE_SIZES = (4, 32, 64, 256)


def attention_cases() -> list[ConformanceCase]:
    """All cases of the op."""
    batches = {**BATCHES, **{name: ([1, 12], [70, 20], settings) for name, settings in _settings().items()}}
    makes: dict[str, Callable[[], AttentionBatch]] = {
        **{name: partial(batch_of, *batch) for name, batch in batches.items()},
        "strided-query": _strided,
        "shared-pages": partial(_shared, 70),
        "shared-pages-1100": partial(_shared, 1100),
    }
    checks = {name: attends(make) for name, make in makes.items()}
    for name in ("decode", "mixed", "decode-1100", "prefill-130-bfloat16", "all-options"):
        checks[f"{name}-without-lse-into-out"] = fills_out(makes[name])
    checks |= attention_value_checks()
    return [ConformanceCase("paged_attention", situation, check) for situation, check in checks.items()]


def _settings() -> dict[str, dict[str, Any]]:
    """Settings of two sequences, a decoded and a longer one."""
    return {
        **dict(option_pairs(OPTIONS)),
        **{
            f"head-dim-{dim}-{dtype_name(dtype)}": {"head_dim": dim, "dtype": dtype}
            for dim in HEAD_DIMS
            for dtype in (F32, F16, BF16)
        },
        **{
            f"page-size-{n}-{layout}": {"page_size": n, "layout": layout}
            for n in PAGE_SIZES
            for layout in ("NHD", "HND")
        },
    }


def _strided() -> AttentionBatch:
    batch = batch_of([1, 12], [20, 30], {})
    query = torch.empty(13, 4, 3, 72)[:, :, 1, 5:69].copy_(batch.query)
    return dataclasses.replace(batch, query=query)


def _shared(kv_len: int) -> AttentionBatch:
    """Four sequences that have all pages but the last in common."""
    batch = batch_of([1, 1, 1, 3], [kv_len] * 4, {"num_kv_heads": 1})
    indptr, pages = batch.table.indptr.tolist(), batch.table.indices.tolist()
    rows = [pages[start:stop] for start, stop in pairwise(indptr)]
    rows = [rows[0][:-1] + row[-1:] for row in rows]
    table = PageTable.from_rows(rows, [kv_len] * 4, batch.plan.page_size)
    with threads_of_caller():  # the plan is cut for them
        plan = plan_attention(batch.plan.query_indptr, table, num_q_heads=2, num_kv_heads=1, head_dim=64)
    return dataclasses.replace(batch, table=table, plan=plan)
