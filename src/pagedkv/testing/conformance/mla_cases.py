"""mla_attention: one latent a token for all heads, over pages whose unused slots hold NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...kernels.merge_states import AttentionState
from ..mla_batch import MLABatch, mla_batch
from ..mla_numeric import assert_mla_close
from .case import Check, ConformanceCase
from .judge import assert_same_memory, placed

__all__ = ["mla_cases"]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Situation: new tokens and all tokens of each sequence, and the settings of `mla_batch`.
BATCHES: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "decode": ([1, 1, 1], [40, 7, 1], {}),
    "decode-float16": ([1, 1], [40, 7], {"dtype": F16}),
    "decode-bfloat16": ([1, 1], [40, 7], {"dtype": BF16}),
    "decode-long": ([1, 1], [300, 257], {"num_heads": 1}),
    "decode-512-64": ([1, 1], [40, 17], {"latent_dim": 512, "rope_dim": 64, "dtype": BF16, "form": "joined"}),
    "decode-without-rope": ([1, 1], [40, 16], {"rope_dim": 0}),
    "page-size-1": ([1, 1], [19, 5], {"page_size": 1}),
    "page-size-3-joined": ([1, 2], [19, 5], {"page_size": 3, "form": "joined"}),
    "page-exactly-full": ([1, 4], [32, 16], {}),
    "page-full-and-one": ([1, 4], [33, 17], {}),
    "append": ([3, 9], [60, 30], {"num_heads": 16}),
    "prefill": ([37], [37], {"form": "joined"}),
    "prefill-not-causal": ([20, 7], [44, 7], {"causal": False}),
    "mixed": ([1, 20, 2, 1], [50, 33, 2, 1], {}),
    "sequences-without-rows": ([1, 0, 5, 0], [20, 30, 9, 0], {}),
    "sequences-without-keys": ([5, 2, 12], [2, 0, 0], {}),
    "empty": ([], [], {}),
    "window": ([1, 30], [70, 41], {"window_left": 9}),
    "scale": ([1, 12], [40, 20], {"sm_scale": -0.7}),
    "float32-query-of-bfloat16": ([1, 5], [40, 20], {"dtype": BF16, "query_dtype": F32}),
    "widths-7-3": ([1, 9], [40, 20], {"latent_dim": 7, "rope_dim": 3}),
    "page-first-pages": ([1, 9], [40, 20], {"form": "page_first"}),
    "sliced-pages": ([1, 9], [40, 20], {"form": "sliced", "page_size": 3}),
}


def mla_cases() -> list[ConformanceCase]:
    """All cases of the op."""
    makes: dict[str, Callable[[], MLABatch]] = {
        **{name: partial(_batch, q_lens, kv_lens, its) for name, (q_lens, kv_lens, its) in BATCHES.items()},
        "custom-mask": _masked,
    }
    return [ConformanceCase("mla_attention", situation, _attends(make)) for situation, make in makes.items()]


def _batch(q_lens: list[int], kv_lens: list[int], settings: dict[str, Any]) -> MLABatch:
    return mla_batch(q_lens, kv_lens, **settings)


def _masked() -> MLABatch:
    """The first row of the first sequence sees nothing."""
    q_lens, kv_lens = [6, 20, 1], [6, 41, 17]
    mask = torch.rand(sum(q * kv for q, kv in zip(q_lens, kv_lens, strict=True))) < 0.6
    mask[: kv_lens[0]] = False
    return mla_batch(q_lens, kv_lens, custom_mask=mask)


def _attends(make: Callable[[], MLABatch]) -> Check:
    """Out and LSE must be as exact as plain torch, and the inputs as they were."""

    def check(backend: str, device: torch.device) -> None:
        batch = make()
        there = placed(batch.arguments(), device)
        out, lse = (result.cpu() for result in dataclasses.replace(batch, **there).run(backend=backend))
        dtypes = batch.q_latent.dtype, torch.float32
        assert (out.dtype, lse.dtype) == dtypes, f"out and lse must have dtypes {dtypes}, got {out.dtype}, {lse.dtype}."
        assert_same_memory(there, batch.arguments())
        assert_mla_close(AttentionState(out, lse), **batch.arguments())

    return check
