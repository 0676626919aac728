"""One forward pass over the works of a step: from scheduled tokens to sampled ones."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..integrations.transformers import PagedModel, PagedStep
from ..management.manager import KVCacheManager
from ..storage.pool import KVPool
from .continuation import Continuation
from .request import Request
from .sampling import sample
from .scheduler import Work

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

    def run(self, works: list[Work]) -> StepOutput:
        """What follows from the works, for the continuations whose last token was among them."""
        try:
            output = self._forward(works)
            for work in works:
                work.seq.commit(work.token_ids)
        except BaseException:
            for work in works:
                if not work.seq.is_closed:
                    work.seq.truncate(work.start)
            raise
        return output

    def _forward(self, works: list[Work]) -> StepOutput:
        device = self._model.device
        ids = [token for work in works for token in work.token_ids]
        stops = torch.tensor([0, *(work.num_tokens for work in works)], device=device).cumsum(0)
        step = PagedStep(
            self._pool,
            self._model.geometry,
            self._manager.page_table([work.seq for work in works]),
            stops.to(torch.int32),
            torch.cat([work.slots for work in works]),
            backend=self._backend,
        )
        receivers = [(at, work.receivers) for at, work in enumerate(works)]
        receivers = [(at, each) for at, each in receivers if each]
        rows = stops[torch.tensor([at for at, _ in receivers], dtype=torch.int64, device=device) + 1] - 1
        logits = self._model.forward(torch.tensor(ids, device=device), step, logit_rows=rows)
        with torch.inference_mode():
            return _output([each for _, each in receivers], logits)


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
