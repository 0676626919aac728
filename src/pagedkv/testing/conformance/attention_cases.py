"""paged_attention: batches of all kinds over pages whose unused slots hold NaN, and every option."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...kernels.merge_states import AttentionState
from ...kernels.paged_attention import paged_attention
from ...kernels.rope import Llama31Scaling, RotaryEmbedding
from ..attention_batch import AttentionBatch, attention_batch
from ..numeric import assert_attention_close
from .case import Check, ConformanceCase
from .judge import assert_same_memory, placed

__all__ = ["attention_cases"]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
LLAMA31 = RotaryEmbedding(32, 500000.0, llama31=Llama31Scaling(old_context_len=100))

# Situation: new tokens and all tokens of each sequence, and the settings of `attention_batch`.
BATCHES: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "decode": ([1, 1, 1], [40, 7, 1], {}),
    "decode-float16": ([1, 1], [40, 7], {"dtype": F16}),
    "decode-bfloat16-HND": ([1, 1], [40, 7], {"dtype": BF16, "layout": "HND"}),
    "decode-long": ([1, 1], [300, 257], {"num_kv_heads": 1}),
    "decode-group-1": ([1, 1], [20, 9], {"group": 1, "num_kv_heads": 3}),
    "decode-group-8": ([1], [35], {"group": 8, "num_kv_heads": 2}),
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
    "large-logits": ([1, 12], [40, 20], {"sm_scale": 200.0}),
    "soft-cap": ([1, 12], [40, 20], {"soft_cap": 3.0, "sm_scale": 1.0}),
    "softmax-table": ([1, 12], [40, 20], {"softmax": "lut"}),
    "sinks": ([1, 12], [40, 20], {"sinks": torch.tensor([0.3, 5.0, -math.inf, 2.0])}),
    "sinks-alone": ([1, 3], [0, 0], {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}),
    "alibi": ([1, 12], [70, 20], {"alibi_slopes": torch.tensor([0.3, 0.0, 0.01, 0.1])}),
    "rope": ([1, 12], [40, 20], {"rope": RotaryEmbedding(32)}),
    "rope-interleaved-bfloat16": ([1, 12], [40, 20], {"rope": RotaryEmbedding(32, interleaved=True), "dtype": BF16}),
    "rope-llama31": ([1, 3], [60, 20], {"rope": LLAMA31, "page_size": 3}),
    "rope-partial": ([1, 9], [40, 20], {"rope": RotaryEmbedding(24)}),
    "rope-before-the-start": ([7, 9], [3, 0], {"rope": LLAMA31, "causal": False}),
    "float-scales": ([1, 12], [40, 20], {"key_scales": 0.3, "value_scales": -3.0}),
    "int8": ([1, 12], [40, 20], {"dtype": I8}),
    "int8-HND-bfloat16-query": ([1, 12], [40, 20], {"dtype": I8, "query_dtype": BF16, "layout": "HND"}),
    "int8-float-scales": ([1, 12], [40, 20], {"dtype": I8, "key_scales": 0.02, "value_scales": 0.05}),
    "float8_e4m3fn": ([1, 12], [40, 20], {"dtype": E4M3}),
    "float8_e4m3fn-without-scales": ([1, 12], [40, 20], {"dtype": E4M3, "key_scales": None, "value_scales": None}),
    "float8_e5m2": ([1, 12], [40, 20], {"dtype": E5M2}),
    "float32-query-of-bfloat16": ([1, 5], [40, 20], {"dtype": BF16, "query_dtype": F32}),
    "out-bfloat16": ([1, 5], [40, 20], {"out_dtype": BF16, "value_scales": 0.3}),
    "widths-48-24": ([1, 9], [40, 20], {"head_dim": 48, "value_dim": 24}),
    "widths-576-512": ([1], [40], {"head_dim": 576, "value_dim": 512, "num_kv_heads": 1}),
    "widths-7-5": ([1, 9], [40, 20], {"head_dim": 7, "value_dim": 5}),
    "interleaved-pages": ([1, 9], [40, 20], {"form": "interleaved", "value_dim": 24}),
    "page-first-pages": ([1, 9], [40, 20], {"form": "page_first", "layout": "HND"}),
    "sliced-pages": ([1, 9], [40, 20], {"form": "sliced", "page_size": 3}),
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


def attention_cases() -> list[ConformanceCase]:
    """All cases of the op."""
    makes: dict[str, Callable[[], AttentionBatch]] = {
        **{name: partial(_batch, q_lens, kv_lens, its) for name, (q_lens, kv_lens, its) in BATCHES.items()},
        "custom-mask": partial(_masked, causal=True),
        "custom-mask-not-causal": partial(_masked, causal=False),
        "custom-mask-window": partial(_masked, causal=False, window_left=4),
        "strided-query": _strided,
    }
    checks = {name: _attends(make) for name, make in makes.items()}
    checks["without-lse-into-out"] = _fills_out
    return [ConformanceCase("paged_attention", situation, check) for situation, check in checks.items()]


def _batch(q_lens: list[int], kv_lens: list[int], settings: dict[str, Any]) -> AttentionBatch:
    return attention_batch(q_lens, kv_lens, **{"head_dim": 32, **settings})


def _masked(**settings: Any) -> AttentionBatch:
    """The first row of the first sequence sees nothing."""
    q_lens, kv_lens = [6, 20, 1], [6, 41, 17]
    mask = torch.rand(sum(q * kv for q, kv in zip(q_lens, kv_lens, strict=True))) < 0.6
    mask[: kv_lens[0]] = False
    return _batch(q_lens, kv_lens, {"custom_mask": mask, **settings})


def _strided() -> AttentionBatch:
    batch = _batch([1, 12], [20, 30], {})
    query = torch.empty(13, 4, 3, 40)[:, :, 1, 5:37].copy_(batch.query)
    return dataclasses.replace(batch, query=query)


def _attends(make: Callable[[], AttentionBatch]) -> Check:
    """Out and LSE must be as exact as plain torch, and the inputs as they were."""

    def check(backend: str, device: torch.device) -> None:
        batch = make()
        there = _placed(batch, device)
        state = there.run(backend=backend)
        assert_same_memory(_tensors(there), _tensors(batch))
        _assert_close(AttentionState(state.out.cpu(), state.lse.cpu()), batch)

    return check


def _fills_out(backend: str, device: torch.device) -> None:
    """Without LSE, into a tensor of the caller: the same rule."""
    batch = _batch([1, 12], [40, 20], {})
    there = _placed(batch, device)
    out = torch.empty(13, 4, 32, device=device)
    arguments = there.query, there.key_pages, there.value_pages, there.plan
    result = paged_attention(*arguments, out=out, backend=backend)
    assert result is out, "the result must be the out that was given."
    with_lse = there.run(backend=backend)
    _assert_close(AttentionState(out.cpu(), with_lse.lse.cpu()), batch)


def _assert_close(state: AttentionState, batch: AttentionBatch) -> None:
    assert state.lse.dtype == torch.float32, f"lse must have dtype torch.float32, got {state.lse.dtype}."
    pages = batch.key_pages, batch.value_pages
    assert_attention_close(state, batch.query, *pages, batch.plan, layout=batch.layout, **batch.options)


def _tensors(batch: AttentionBatch) -> dict[str, Any]:
    fields = {name: getattr(batch, name) for name in ("query", "key_pages", "value_pages", "plan")}
    return {**fields, **batch.options}


def _placed(batch: AttentionBatch, device: torch.device) -> AttentionBatch:
    there = placed(_tensors(batch), device)
    options = {name: there.pop(name) for name in batch.options}
    return dataclasses.replace(batch, options=options, **there)
