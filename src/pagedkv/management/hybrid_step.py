"""A step over sequences of several groups of layers: reserved in all groups or in none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .page_budget import PageBudget
from .sequence import Sequence
from .step_batch import StepBatch
from .step_planner import StepPlanner

__all__ = ["HybridStepBatch", "commit_step", "reserve_step", "step_needs"]

Counts = int | npt.NDArray[np.int64]
Parts = list[list[Sequence]]


@dataclass(eq=False, slots=True)
class HybridStepBatch:
    """The reservation of one step: a StepBatch for each group of layers, in the order of the manager's groups."""

    groups: tuple[StepBatch, ...]

    @property
    def query_indptr(self) -> torch.Tensor:
        """Which of the new tokens are each sequence's, [S + 1] int32: the same in every group."""
        return self.groups[0].query_indptr

    @property
    def seq_lens(self) -> torch.Tensor:
        """Tokens of each sequence, the new ones included: [S] int32."""
        return self.groups[0].seq_lens

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return self.groups[0].num_tokens


def step_needs(planners: list[StepPlanner], parts: Parts, num_tokens: Counts) -> tuple[list[int], int]:
    """Pages that the step takes in each group, and how many must stay besides."""
    needs = [planner.needs(own, num_tokens) for planner, own in zip(planners, parts, strict=True)]
    return [num_pages for num_pages, _ in needs], max(kept_free for _, kept_free in needs)


def reserve_step(budget: PageBudget, planners: list[StepPlanner], parts: Parts, num_tokens: Counts) -> HybridStepBatch:
    """Reserves for all sequences in all groups or, raising OutOfPagesError, for none."""
    needed, kept_free = step_needs(planners, parts, num_tokens)
    shares = budget.obtain_shares(needed, kept_free)
    before = [seq.num_tokens for seq in parts[0]]
    steps: list[StepBatch] = []
    try:
        for planner, own, pages in zip(planners, parts, shares, strict=True):
            steps.append(planner.reserve(own, num_tokens, pages))
    except Exception:  # a pool that does not copy
        for pages in shares[len(steps) + 1 :]:
            budget.allocator.free(pages)
        for own in parts[: len(steps)]:
            for seq, length in zip(own, before, strict=True):
                seq._cut(length)
        raise
    for step in steps[1:]:
        # What they hold is the same; plans of all groups then know the one that callers pass.
        step.query_indptr = steps[0].query_indptr
    return HybridStepBatch(tuple(steps))


def commit_step(planners: list[StepPlanner], parts: Parts, token_ids: npt.NDArray[np.int64]) -> None:
    """Names one reserved token of each sequence in all groups; what one of them refuses is done in none."""
    for planner, own in zip(planners, parts, strict=True):
        planner.check_commit(own, token_ids)
    for planner, own in zip(planners, parts, strict=True):
        planner.commit(own, token_ids)
