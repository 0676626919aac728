"""One forward pass over the works of a step: from scheduled tokens to sampled ones."""

from __future__ import annotations

import torch

from ..integrations.transformers import PagedModel, PagedStep
from ..management.manager import KVCacheManager
from ..storage.pool import KVPool
from .request import Request
from .sampling import sample
from .scheduler import Work

__all__ = ["StepRunner"]


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

    def run(self, works: list[Work]) -> list[tuple[Request, int]]:
        """The sampled tokens, of the requests whose last token was among the works."""
        try:
            tokens = self._forward(works)
            for work in works:
                work.seq.commit(work.request.ids[work.start : work.stop])
        except BaseException:
            for work in works:
                if not work.seq.is_closed:
                    work.seq.truncate(work.start)
            raise
        return tokens

    def _forward(self, works: list[Work]) -> list[tuple[Request, int]]:
        device = self._model.device
        ids = [token for work in works for token in work.request.ids[work.start : work.stop]]
        stops = torch.tensor([0, *(work.num_tokens for work in works)], device=device).cumsum(0)
        step = PagedStep(
            self._pool,
            self._model.geometry,
            self._manager.page_table([work.seq for work in works]),
            stops.to(torch.int32),
            torch.cat([work.slots for work in works]),
            backend=self._backend,
        )
        sampled = [row for row, work in enumerate(works) if work.gives_token]
        rows = stops[torch.tensor(sampled, dtype=torch.int64, device=device) + 1] - 1
        logits = self._model.forward(torch.tensor(ids, device=device), step, logit_rows=rows)
        requests = [works[row].request for row in sampled]
        return list(zip(requests, _sample(requests, logits), strict=True))


def _sample(requests: list[Request], logits: torch.Tensor) -> list[int]:
    if not requests:
        return []
    with torch.inference_mode():
        # NaN spreads to the maximum; a row of -inf alone, or one with +inf, has no most likely token either.
        highest = logits.amax(dim=-1)
        is_broken = ~torch.isfinite(highest)
        if bool(is_broken.any()):
            row = int(is_broken.int().argmax())
            raise FloatingPointError(
                f"logits of request {requests[row].id} must have a finite maximum, got {float(highest[row])}. "
                "Check the model's dtype."
            )
        return sample(logits, [request.params for request in requests], [request.generator for request in requests])
