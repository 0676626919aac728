"""One request: what was asked, how far it is, and what came out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..management.radix_cache import Namespace
from .beam_search import BeamSearch
from .continuation import Continuation, ContinuationResult, FinishReason
from .sampling import SamplingParams

__all__ = ["OnToken", "Request", "RequestResult", "RequestTimings", "TokenEvent"]

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

    token_ids, text and finish_reason are of the first of `continuations`; the request's own reason, where it was
    cancelled or ended in an error. token_ids are without the EOS that ended it; text is without the stop string, and
    "" without a tokenizer. num_cached_tokens: prompt tokens whose keys and values were in the prefix cache. error: set
    for the reason "error". continuations: params.n of them in order of their index, or best first where they are the
    best of more; of a beam search, best first.
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
    continuations: tuple[ContinuationResult, ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """What `on_token` gets: new tokens and text of one continuation of a request.

    The last event of each continuation has `finished` set, and its reason; `request.finished` says when all are.
    """

    request: Request
    token_ids: tuple[int, ...]
    text: str
    finished: bool
    finish_reason: FinishReason | None
    index: int = 0


OnToken = Callable[[TokenEvent], None]


class Request:
    """The handle of a submitted request. Callers read it; only the engine that made it changes it.

    Continuations that have tokens in common, the prompt at first, have them computed by the first of them, the trunk:
        [0, num_shared)      computed once, by the trunk; then the others fork its sequence
        [num_shared, ...)    computed by each on pages of its own; a partly filled last page is copied on write
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
        self.error: Exception | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.continuations = [Continuation(self, index) for index in range(params.num_continuations)]
        # The engine's part.
        self.prompt_array = np.array(prompt_ids, dtype=np.int64)
        self.max_new_tokens = params.max_new_tokens
        self.stop_ids: frozenset[int] = frozenset()
        self.search: BeamSearch | None = None
        self.num_shared = len(prompt_ids)
        self.submitted_at = submitted_at
        self.admitted_at = self.first_token_at = self.finished_at = math.nan

    @property
    def finished(self) -> bool:
        """True when nothing more will come."""
        return self.status == "finished"

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended, None before."""
        if not self.finished:
            return None
        if self.error is not None:
            return "error"
        is_cancelled = any(continuation.finish_reason == "cancelled" for continuation in self.continuations)
        return "cancelled" if is_cancelled else self.returned()[0].finish_reason

    @property
    def token_ids(self) -> list[int]:
        """The new tokens so far, a copy; of the first continuation where there are several."""
        return self.returned()[0].token_ids

    @property
    def num_new_tokens(self) -> int:
        """How many new tokens there are so far; of the first continuation where there are several."""
        return self.returned()[0].num_new_tokens

    @property
    def text(self) -> str:
        """The text so far; of the first continuation where there are several."""
        return self.returned()[0].text

    @property
    def live(self) -> list[Continuation]:
        """The continuations that are not finished."""
        return [continuation for continuation in self.continuations if not continuation.finished]

    @property
    def followers(self) -> list[Continuation]:
        """Those that wait for the trunk, the first of the live ones, to compute what they have in common."""
        if len(self.continuations) == 1:  # most requests, several times a step
            return []
        return [continuation for continuation in self.live[1:] if continuation.seq is None]

    def fork_followers(self) -> bool:
        """Lets all continuations go on by themselves, once the trunk has computed what they have in common; True when
        they do so now."""
        followers = self.followers
        trunk = self.live[0].seq if followers else None
        if trunk is None or trunk.num_committed < self.num_shared:
            return False
        for continuation in followers:
            continuation.seq = trunk.fork()
        return True

    def give_pages_back(self) -> None:
        """Closes all sequences; the next admission begins with what the continuations now have in common."""
        for continuation in self.continuations:
            continuation.close()
        self.num_shared = _num_common([continuation.ids for continuation in self.live] or [self.prompt_ids])

    def returned(self) -> list[Continuation]:
        """The continuations of the result: while it runs those that come first, in the end the best."""
        if self.finished and self.params.num_continuations > self.params.num_returned and self.search is None:
            ranked = sorted(self.continuations, key=lambda continuation: continuation.score, reverse=True)
            return ranked[: self.params.num_returned]
        return self.continuations[: self.params.num_returned]

    def result(self) -> RequestResult:
        """What came of it. Raises: ValueError before it is finished."""
        if self.finish_reason is None:
            raise ValueError(f"request {self.id} must be finished to have a result, got status {self.status!r}.")
        results = tuple(continuation.result() for continuation in self.returned())
        return RequestResult(
            self.id,
            self.prompt_ids,
            results[0].token_ids,
            results[0].text,
            self.finish_reason,
            self.error,
            self.num_cached_tokens,
            self.num_preemptions,
            RequestTimings(
                self.admitted_at - self.submitted_at,
                self.first_token_at - self.submitted_at,
                self.finished_at - self.submitted_at,
            ),
            results,
        )

    def __repr__(self) -> str:
        several = f", {len(self.continuations)} continuations" if len(self.continuations) > 1 else ""
        return (
            f"Request(id={self.id}, {self.status}, {len(self.prompt_ids)} prompt tokens, {self.num_new_tokens} new"
            f"{several}, finish_reason={self.finish_reason!r})"
        )


def _num_common(texts: list[list[int]] | list[tuple[int, ...]]) -> int:
    """Tokens that all texts begin with: as many as the first and the last in lexicographic order."""
    low, high = min(texts), max(texts)
    return next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
