"""mla_attention: one latent a token for all heads, over pages whose unused slots hold NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...kernels.merge_states import AttentionState
from ...kernels.mla_attention import mla_attention
from ..mla_batch import MLABatch, mla_batch
from ..mla_numeric import assert_mla_close
from .case import Check, ConformanceCase, threads_of_caller
from .judge import assert_same_memory, placed
from .option_pairs import option_pairs, random_mask

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
    "decode-1100": ([1, 1, 1], [1100, 1024, 1025], {"num_heads": 2}),
    "decode-1100-512-64-bfloat16": ([1], [1100], {"latent_dim": 512, "rope_dim": 64, "dtype": BF16, "num_heads": 2}),
    "append-1100": ([5, 2], [1100, 1030], {}),
    "decode-16-heads": ([1, 1], [40, 17], {"num_heads": 16, "latent_dim": 512, "rope_dim": 64}),
    "decode-128-heads": ([1], [40], {"num_heads": 128, "latent_dim": 512, "rope_dim": 64}),
    "decode-128-heads-bfloat16": ([1], [40], {"num_heads": 128, "latent_dim": 512, "rope_dim": 64, "dtype": BF16}),
    "prefill-128-heads": ([5], [9], {"num_heads": 128}),
    "decode-20-sequences": ([1] * 20, list(range(1, 60, 3)), {}),
    "decode-70-sequences": ([1] * 70, list(range(3, 73)), {"num_heads": 1}),
    "prefill-130": ([130], [130], {"num_heads": 2}),
    "prefill-130-window": ([130], [140], {"num_heads": 1, "window_left": 70}),
    "decode-128-32": ([1, 3], [40, 17], {"latent_dim": 128, "rope_dim": 32, "dtype": F16}),
    "decode-256-64": ([1, 3], [40, 17], {"latent_dim": 256, "rope_dim": 64}),
    "page-size-4": ([1, 2], [19, 5], {"page_size": 4}),
    "page-size-64": ([1, 2], [190, 64], {"page_size": 64, "form": "joined"}),
    "page-size-256": ([1, 2], [190, 257], {"page_size": 256}),
    "large-logits": ([1, 12], [40, 20], {"sm_scale": 60.0}),
    # Of the first sequence no row asks: its pages are there so that the ids of the others go beyond 16 bits.
    "page-ids-past-65535": ([0, 1, 3], [70_000, 40, 30], {"page_size": 1, "latent_dim": 16, "rope_dim": 8}),
    "custom-mask": ([6, 20, 1], [6, 41, 17], {"masked": True}),
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


# Each with each other: what one option does must not end what another does.
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window_left": 9},
    "custom-mask": {"masked": True},
    "not-causal": {"causal": False},
    "scale": {"sm_scale": 0.7},
    "float16": {"dtype": F16},
    "bfloat16": {"dtype": BF16},
    "joined": {"form": "joined"},
    "without-rope": {"rope_dim": 0},
    "page-size-3": {"page_size": 3},
    "16-heads": {"num_heads": 16},
}


def mla_cases() -> list[ConformanceCase]:
    """All cases of the op."""
    batches = {**BATCHES, **{name: ([1, 12], [70, 20], settings) for name, settings in option_pairs(OPTIONS)}}
    checks = {name: _attends(partial(_batch, *batch)) for name, batch in batches.items()}
    for name in ("decode", "prefill", "decode-1100"):
        checks[f"{name}-without-lse-into-out"] = _fills_out(partial(_batch, *batches[name]))
    return [ConformanceCase("mla_attention", situation, check) for situation, check in checks.items()]


def _batch(q_lens: list[int], kv_lens: list[int], settings: dict[str, Any]) -> MLABatch:
    """By the settings of `mla_batch`; `masked` adds a custom mask."""
    settings = {"custom_mask": None, **settings}
    if settings.pop("masked", False):
        settings["custom_mask"] = random_mask(q_lens, kv_lens)
    with threads_of_caller():  # the plan is cut for them
        return mla_batch(q_lens, kv_lens, **settings)


def _attends(make: Callable[[], MLABatch]) -> Check:
    """Out and LSE must be as exact as plain torch, and the inputs as they were."""

    def check(backend: str, device: torch.device) -> None:
        batch = make()
        there = placed(batch.arguments(), device)
        with threads_of_caller():
            out, lse = (result.cpu() for result in dataclasses.replace(batch, **there).run(backend=backend))
        dtypes = batch.q_latent.dtype, torch.float32
        assert (out.dtype, lse.dtype) == dtypes, f"out and lse must have dtypes {dtypes}, got {out.dtype}, {lse.dtype}."
        assert_same_memory(there, batch.arguments())
        assert_mla_close(AttentionState(out, lse), **batch.arguments())

    return check


def _fills_out(make: Callable[[], MLABatch]) -> Check:
    """Without LSE, into a tensor of the caller: the same rule, and no byte beside it is written."""

    def check(backend: str, device: torch.device) -> None:
        batch = make()
        there = placed(batch.arguments(), device)
        memory = batch.q_latent.new_zeros(len(batch.q_latent) + 2, *batch.q_latent.shape[1:]).to(device)
        out = memory[1:-1]
        with threads_of_caller():
            result = mla_attention(**there, out=out, backend=backend)
            lse = dataclasses.replace(batch, **there).run(backend=backend).lse
        assert result is out, "the result must be the out that was given."
        assert not memory[[0, -1]].any(), "bytes outside out must stay as they were."
        assert_mla_close(AttentionState(memory[1:-1].cpu(), lse.cpu()), **batch.arguments())

    return check
