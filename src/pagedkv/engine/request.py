"""One request: what was asked, how far it is, and what came out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..management.radix_cache import Namespace
from ..management.sequence import Sequence
from .sampling import SamplingParams
from .text import TextStream

__all__ = ["FinishReason", "OnToken", "Request", "RequestResult", "RequestTimings", "TokenEvent"]

FinishReason = Literal["stop", "length", "cancelled", "error"]
Status = Literal["waiting", "running", "finished"]


@dataclass(frozen=True)
class RequestTimings:
    """Seconds since the request was submitted; NaN for what never happened."""

    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True)
class RequestResult:
    """What came of a request.

    token_ids are without the EOS that ended it; text is without the stop string, and "" without a tokenizer.
    num_cached_tokens: prompt tokens whose keys and values were in the prefix cache. error: set for the reason "error".
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    error: Exception | None
    num_cached_tokens: int
    num_preemptions: int
    timings: RequestTimings


@dataclass(frozen=True)
class TokenEvent:
    """What `on_token` gets: new tokens and text of a request; the last event of each request has `finished` set."""

    request: Request
    token_ids: tuple[int, ...]
    text: str
    finished: bool
    finish_reason: FinishReason | None


OnToken = Callable[[TokenEvent], None]


class Request:
    """The handle of a submitted request. Callers read it; only the engine that made it changes it.

    Tokens, in half-open intervals of `ids`, prompt and new tokens together:
        [0, seq.num_committed)           computed: their keys and values are in pages
        [seq.num_committed, len(ids))    to be computed; one token while decoding, more in prefill and after preemption
    """

    def __init__(
        self,
        request_id: int,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        namespace: Namespace,
        on_token: OnToken | None,
        submitted_at: float,
    ) -> None:
        self.id = request_id
        self.prompt_ids = prompt_ids
        self.params = params
        self.namespace = namespace
        self.on_token = on_token
        self.status: Status = "waiting"
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        # The engine's part.
        self.ids = list(prompt_ids)
        self.prompt_array = np.array(prompt_ids, dtype=np.int64)
        self.max_new_tokens = params.max_new_tokens
        self.stop_ids: frozenset[int] = frozenset()
        self.generator: torch.Generator | None = None
        self.stream: TextStream | None = None
        self.seq: Sequence | None = None
        self.submitted_at = submitted_at
        self.admitted_at = self.first_token_at = self.finished_at = math.nan

    @property
    def finished(self) -> bool:
        """True when nothing more will come."""
        return self.status == "finished"

    @property
    def token_ids(self) -> list[int]:
        """The new tokens so far, a copy."""
        return self.ids[len(self.prompt_ids) :]

    @property
    def num_new_tokens(self) -> int:
        """How many new tokens there are so far."""
        return len(self.ids) - len(self.prompt_ids)

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in pages now."""
        return 0 if self.seq is None else self.seq.num_committed

    @property
    def num_uncomputed(self) -> int:
        """Tokens to be computed before the next one can be sampled."""
        return len(self.ids) - self.num_computed

    def result(self) -> RequestResult:
        """What came of it. Raises: ValueError before it is finished."""
        if self.finish_reason is None:
            raise ValueError(f"request {self.id} must be finished to have a result, got status {self.status!r}.")
        return RequestResult(
            self.id,
            self.prompt_ids,
            tuple(self.token_ids),
            self.text,
            self.finish_reason,
            self.error,
            self.num_cached_tokens,
            self.num_preemptions,
            RequestTimings(
                self.admitted_at - self.submitted_at,
                self.first_token_at - self.submitted_at,
                self.finished_at - self.submitted_at,
            ),
        )

    def __repr__(self) -> str:
        return (
            f"Request(id={self.id}, {self.status}, {len(self.prompt_ids)} prompt tokens, {self.num_new_tokens} new, "
            f"finish_reason={self.finish_reason!r})"
        )
