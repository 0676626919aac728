"""What a case of paged_attention does with its batch: runs it on the device of the back end and compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ...kernels.merge_states import AttentionState
from ...kernels.paged_attention import paged_attention
from ..attention_batch import AttentionBatch, attention_batch
from ..numeric import assert_attention_close
from .case import Check, threads_of_caller
from .judge import assert_same_memory, placed
from .option_pairs import random_mask

__all__ = ["assert_close", "attends", "batch_of", "fills_out", "run_unchanged"]

MakeBatch = Callable[[], AttentionBatch]


def batch_of(q_lens: list[int], kv_lens: list[int], settings: dict[str, Any]) -> AttentionBatch:
    """By the settings of `attention_batch`; `masked` adds a custom mask."""
    settings = {"custom_mask": None, **settings}
    if settings.pop("masked", False):
        settings["custom_mask"] = random_mask(q_lens, kv_lens)
    with threads_of_caller():  # the plan is cut for them
        return attention_batch(q_lens, kv_lens, **settings)


def attends(make: MakeBatch) -> Check:
    """Out and LSE must be as exact as plain torch, and the inputs as they were."""

    def check(backend: str, device: torch.device) -> None:
        batch = make()
        assert_close(run_unchanged(batch, backend, device), batch)

    return check


def fills_out(make: MakeBatch) -> Check:
    """Without LSE, into a tensor of the caller: the same rule, and no byte beside it is written."""

    def check(backend: str, device: torch.device) -> None:
        batch = make()
        there = _placed(batch, device)
        plan = batch.plan
        memory = torch.zeros(plan.num_tokens + 2, plan.num_q_heads, plan.value_dim, dtype=batch.query.dtype).to(device)
        arguments = there.query, there.key_pages, there.value_pages, there.plan
        out = memory[1:-1]
        with threads_of_caller():
            result = paged_attention(*arguments, layout=batch.layout, **there.options, out=out, backend=backend)
            lse = there.run(backend=backend).lse
        assert result is out, "the result must be the out that was given."
        assert not memory[[0, -1]].any(), "bytes outside out must stay as they were."
        assert_close(AttentionState(out.cpu(), lse.cpu()), batch)

    return check


def run_unchanged(batch: AttentionBatch, backend: str, device: torch.device) -> AttentionState:
    """The result, on the CPU, of a run that must leave its inputs as they were."""
    there = _placed(batch, device)
    with threads_of_caller():
        state = there.run(backend=backend)
    assert_same_memory(_tensors(there), _tensors(batch))
    return AttentionState(state.out.cpu(), state.lse.cpu())


def assert_close(state: AttentionState, batch: AttentionBatch) -> None:
    """Asserts the rule of `testing/numeric.py`."""
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
