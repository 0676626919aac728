"""One text that continues a prompt: its tokens, its pages, its random numbers and how likely it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from ..management.sequence import Sequence
from .text import TextStream

if TYPE_CHECKING:
    from .request import Request

__all__ = ["Continuation", "ContinuationResult", "Ending", "FinishReason"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class ContinuationResult:
    """What came of one continuation.

    index: which of the request's continuations it is, as in its events; of beams, the rank.
    token_ids are without the EOS that ended it; text is without the stop string, and "" without a tokenizer.
    cumulative_logprob: summed log-probability of its tokens, the EOS included, by the model's own logits: before
            temperature, top-k and top-p.
    score:  what the best are chosen by: that sum over the number of those tokens, of beams over that number **
            length_penalty. -inf for none.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    cumulative_logprob: float
    score: float


class Continuation:
    """One of the texts that continue a request's prompt. Callers read it; only the engine changes it.

    Tokens, in half-open intervals of `ids`, prompt and new tokens together:
        [0, seq.num_committed)           computed: their keys and values are in pages
        [seq.num_committed, len(ids))    to be computed; one token while decoding, more in prefill and after preemption
    """

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.ids = list(request.prompt_ids)
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.cumulative_logprob = 0.0
        self.score = -math.inf
        # The engine's part.
        self.generator: torch.Generator | None = None
        self.stream: TextStream | None = None
        self.seq: Sequence | None = None
        self._num_sampled = 0

    @property
    def finished(self) -> bool:
        """True when no token will follow."""
        return self.finish_reason is not None

    @property
    def token_ids(self) -> list[int]:
        """The new tokens so far, a copy."""
        return self.ids[len(self.request.prompt_ids) :]

    @property
    def num_new_tokens(self) -> int:
        """How many new tokens there are so far."""
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in pages now."""
        return 0 if self.seq is None else self.seq.num_committed

    @property
    def num_uncomputed(self) -> int:
        """Tokens to be computed before the next one can be sampled."""
        return len(self.ids) - self.num_computed

    def weigh(self, logprob: float) -> None:
        """Counts the log-probability of a token that was sampled, an EOS too."""
        self._num_sampled += 1
        self.cumulative_logprob += logprob
        self.score = self.cumulative_logprob / self._num_sampled

    def push(self, token: int) -> tuple[str, bool]:
        """Adds a token: the text that became certain with it, and whether a stop string ended it."""
        self.ids.append(token)
        piece, is_stopped = self.stream.push(token) if self.stream is not None else ("", False)
        self.text += piece
        return piece, is_stopped

    def flush(self) -> tuple[str, bool]:
        """The text that was held back, at the end, and whether a stop string ended in it."""
        rest, is_stopped = self.stream.flush() if self.stream is not None else ("", False)
        self.text += rest
        return rest, is_stopped

    def close(self) -> None:
        """Gives its pages back."""
        if self.seq is not None:
            self.seq.close()
            self.seq = None

    def result(self) -> ContinuationResult:
        """What came of it, once it is finished."""
        assert self.finish_reason is not None  # the request is finished, and all its continuations with it
        tokens = tuple(self.token_ids)
        return ContinuationResult(
            self.index, tokens, self.text, self.finish_reason, self.cumulative_logprob, self.score
        )


class Ending(NamedTuple):
    """A continuation that is to end, and why; tokens and text that came last and were not told yet."""

    continuation: Continuation
    reason: FinishReason
    token_ids: tuple[int, ...] = ()
    text: str = ""
