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
        self._logprobs: list[float] = []
        self._num_told, self._text_told = len(self.ids), 0

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
        """Counts the log-probability of a token that was sampled, an EOS too; before the token is pushed."""
        self._logprobs.append(logprob)
        self.cumulative_logprob += logprob
        self.score = self.cumulative_logprob / len(self._logprobs)

    def push(self, token: int) -> None:
        """Adds a token, and the text that became certain with it."""
        self.ids.append(token)
        if self.stream is not None:
            self.text += self.stream.push(token).text

    def why_it_ends(self) -> FinishReason | None:
        """What its last token ends it by, an EOS apart, which is none of its tokens."""
        if self.stream is not None and self.stream.is_stopped:
            return "stop"
        return "length" if self.num_new_tokens >= self.request.max_new_tokens else None

    def flush(self) -> bool:
        """Adds the text that was held back, at the end: whether a stop string ended in it."""
        if self.stream is None:
            return False
        rest, is_stopped = self.stream.flush()
        self.text += rest
        return is_stopped

    def read_again(self) -> None:
        """Makes what follows from its tokens anew, since an interrupt may have come between a token and its text."""
        del self._logprobs[self.num_new_tokens :]
        total = 0.0
        for logprob in self._logprobs:
            total += logprob
        self.cumulative_logprob, self.score = total, total / len(self._logprobs) if self._logprobs else -math.inf
        if self.stream is not None:
            self.stream.restart()
            self.text = "".join([self.stream.push(token).text for token in self.token_ids])

    def take_news(self) -> tuple[tuple[int, ...], str]:
        """The tokens and the text since the last call; what an interrupt kept from being told comes with the next."""
        token_ids, text = tuple(self.ids[self._num_told :]), self.text[self._text_told :]
        self._num_told, self._text_told = len(self.ids), len(self.text)
        return token_ids, text

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
    """A continuation that is to end, and why."""

    continuation: Continuation
    reason: FinishReason
