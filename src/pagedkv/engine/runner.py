"""One forward pass over the works of a step: from scheduled tokens to sampled ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..integrations.transformers import PagedModel, PagedStep
from ..kernels.upload import uploaded
from ..management.manager import KVCacheManager
from ..management.step_batch import StepBatch
from ..storage.pool import KVPool
from .continuation import Continuation
from .request import Request
from .sampling import sample
from .schedule import Work, commit

__all__ = ["BeamLogits", "SampledToken", "StepOutput", "StepRunner"]


class SampledToken(NamedTuple):
    """The next token of a continuation."""

    continuation: Continuation
    token: int
    logprob: float


class BeamLogits(NamedTuple):
    """What the beams of a request go on by: logits [B, V] of each beam's last token."""

    request: Request
    logits: torch.Tensor


class StepOutput(NamedTuple):
    """What one forward pass gives."""

    tokens: list[SampledToken]
    beams: list[BeamLogits]


class StepRunner:
    """Computes works: keys and values into their slots, token ids committed, the next tokens sampled.

    Rule: all of it, or nothing that counts: whatever goes wrong, the works' slots are given back and the requests are
          what they were, so that the same tokens can be scheduled again.
    """

    def __init__(self, model: PagedModel, pool: KVPool, manager: KVCacheManager, backend: str) -> None:
        self._model = model
        self._pool = pool
        self._manager = manager
        self._backend = backend

    def run(self, works: list[Work], batch: StepBatch) -> StepOutput:
        """What follows from the works, for the continuations whose last token was among them.

        batch: what was reserved for the works, in their order.
        """
        try:
            output = self._forward(works, batch)
            commit(self._manager, works)
        except BaseException:
            self._manager.stats()  # after an interrupt inside of the manager: settles what state the sequences are in
            for work in works:
                if work.seq.state == "on pages":
                    work.seq.truncate(work.start)
            raise
        return output

    def _forward(self, works: list[Work], batch: StepBatch) -> StepOutput:
        device = self._model.device
        ids = [token for work in works for token in work.token_ids]
        step = PagedStep(
            self._pool,
            self._model.geometry,
            batch.page_table,
            batch.query_indptr,
            batch.slot_mapping,
            backend=self._backend,
        )
        receivers = [work.receivers for work in works]
        stops = np.cumsum([len(work.token_ids) for work in works])
        rows = uploaded(stops[[bool(each) for each in receivers]] - 1, device)
        logits = self._model.forward(uploaded(np.array(ids, np.int64), device), step, logit_rows=rows)
        with torch.inference_mode():
            return _output([each for each in receivers if each], logits)


def _output(receivers: list[list[Continuation]], logits: torch.Tensor) -> StepOutput:
    """The outcome for the continuations that each row of logits [R, V] is for."""
    if not receivers:
        return StepOutput([], [])
    _check_logits([each[0].request for each in receivers], logits)
    row_of = {id(continuation): row for row, each in enumerate(receivers) for continuation in each}
    sampled = [continuation for each in receivers for continuation in each if continuation.request.search is None]
    beams = {each[0].request.id: each[0].request for each in receivers if each[0].request.search is not None}
    return StepOutput(
        _sampled(sampled, _rows(logits, [row_of[id(continuation)] for continuation in sampled])),
        [
            BeamLogits(request, _rows(logits, [row_of[id(beam)] for beam in request.continuations]))
            for request in beams.values()
        ],
    )


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The rows, not copied where they are all of them in order."""
    return logits if rows == list(range(logits.shape[0])) else logits[rows]


def _sampled(continuations: list[Continuation], logits: torch.Tensor) -> list[SampledToken]:
    """A token of each continuation by its row of logits [R, V], and its log-probability by the model alone."""
    if not continuations:
        return []
    params = [continuation.request.params for continuation in continuations]
    tokens = sample(logits, params, [continuation.generator for continuation in continuations])
    chosen = logits[torch.arange(len(tokens), device=logits.device), torch.tensor(tokens, device=logits.device)]
    logprobs = (chosen.float() - torch.logsumexp(logits.float(), dim=-1)).tolist()
    return [SampledToken(*row) for row in zip(continuations, tokens, logprobs, strict=True)]


def _check_logits(requests: list[Request], logits: torch.Tensor) -> None:
    # NaN spreads to the maximum; a row of -inf alone, or one with +inf, has no most likely token either.
    highest = logits.amax(dim=-1)
    is_broken = ~torch.isfinite(highest)
    if bool(is_broken.any()):
        row = int(is_broken.int().argmax())
        raise FloatingPointError(
            f"logits of request {requests[row].id} must have a finite maximum, got {float(highest[row])}. "
            "Check the model's dtype."
        )
