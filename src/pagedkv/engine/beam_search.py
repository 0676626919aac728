"""Beam search as bookkeeping: logits in, parents and tokens out, and the best continuations at the end.

It knows of no cache and runs no model: what it returns is what a cache reorders its sequences or beams by.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from ..shapes import Shapes, check_floating, check_int

__all__ = ["BeamSearch", "BeamStep", "EarlyStopping", "Hypothesis"]

EarlyStopping = bool | str

# Stands for "not yet": a beam that has no text of its own, a hypothesis that is not finished. Finite on purpose: such
# scores still add up and compare, which decides what is chosen where a vocabulary has fewer tokens than beams.
_NOT_YET = -1.0e9

_REAL = (int, float, np.integer, np.floating)


class BeamStep(NamedTuple):
    """How the beams go on: beam i becomes a copy of beam parents[i] that goes on with tokens[i]; both [B] int64."""

    parents: torch.Tensor
    tokens: torch.Tensor


class Hypothesis(NamedTuple):
    """A finished continuation: its tokens, the EOS that ended it included, and its score, penalised by its length."""

    token_ids: tuple[int, ...]
    score: float


class _Finished(NamedTuple):
    """The best hypotheses so far, best first; rows that are not finished hold a place. Shapes: scores, flags [B]."""

    scores: torch.Tensor
    flags: torch.Tensor
    token_ids: list[tuple[int, ...]]


class _State(NamedTuple):
    """All that a step changes, so that an interrupt leaves it as it was or as it will be. Shapes: scores [B]."""

    num_new_tokens: int
    scores: torch.Tensor
    running: tuple[tuple[int, ...], ...]
    finished: _Finished
    is_done: bool


class BeamSearch:
    """Keeps the `num_beams` likeliest continuations of one prompt, as transformers' beam search does.

    length_penalty: a hypothesis of n new tokens (EOS included, the prompt not) scores its summed log-probability over
            n ** length_penalty; above 0 favours long ones, below 0 short ones. Far below 0, scores may fall under -1e9:
            such texts do not count, here as in transformers, and best() may then be empty.
    early_stopping: when to stop with num_beams hypotheses finished. True: at once. False: once no running beam scores
            better at its present length. "never": once none can at any length, as far as the penalty's sign tells.
    eos_token_ids: tokens that finish a hypothesis; max_new_tokens finishes all.
    Rule:   log_softmax, sums and comparisons in float32; ties as torch.topk breaks them. An EOS counts only among the
            num_beams likeliest candidates of a step; of these there are max(2, 1 + number of EOS) * num_beams.
    Raises: ValueError, TypeError for options out of range. Numbers may be Python's or numpy's.

    >>> search = BeamSearch(2, max_new_tokens=2)
    >>> search.step(torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])).tokens.tolist()
    [1, 2]
    >>> step = search.step(torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]))
    >>> search.is_done, search.best()[0].token_ids
    (True, (2, 0))
    """

    def __init__(
        self,
        num_beams: int,
        *,
        max_new_tokens: int,
        eos_token_ids: Iterable[int] = (),
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        num_return_sequences: int = 1,
    ) -> None:
        self.num_beams = _checked_int("num_beams", num_beams, minimum=1)
        self.max_new_tokens = _checked_int("max_new_tokens", max_new_tokens, minimum=1)
        self.num_return_sequences = _checked_int("num_return_sequences", num_return_sequences, minimum=1)
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences must be at most {num_beams} (num_beams), got {num_return_sequences}."
            )
        self.eos_token_ids = _checked_eos(eos_token_ids)
        self._early_stopping = _checked_early_stopping(early_stopping)
        self._length_penalty = _checked_length_penalty(length_penalty, self.max_new_tokens)
        self._num_candidates = max(2, 1 + len(self.eos_token_ids)) * self.num_beams
        # All beams start as the prompt: only the first may be continued, or all would be continued alike.
        scores = _not_yet(self.num_beams)
        scores[0] = 0.0
        flags = torch.zeros(self.num_beams, dtype=torch.bool, device="cpu")
        finished = _Finished(_not_yet(self.num_beams), flags, [()] * self.num_beams)
        self._state = _State(0, scores, ((),) * self.num_beams, finished, False)

    @property
    def is_done(self) -> bool:
        """True when nothing is to be computed any more."""
        return self._state.is_done

    @property
    def num_new_tokens(self) -> int:
        """Steps so far: the new tokens of each running beam."""
        return self._state.num_new_tokens

    @property
    def running(self) -> tuple[tuple[int, ...], ...]:
        """The new tokens of each beam, in the order of the beams."""
        return self._state.running

    def step(self, logits: torch.Tensor) -> BeamStep:
        """Chooses each beam's next token by the logits of its last one.

        Shapes: logits [B, V] floating; in the first step the rows are alike, that of the prompt's last token.
        When:   until `is_done`; before it computes `tokens`, the caller lets every cache follow `parents`. What the
                step that ends the search returns is of no use.
        Owns:   the search's own state, nothing of `logits`. A call that raises changes nothing.
        Raises: ValueError, TypeError for logits that do not fit and for a search that is done; FloatingPointError for
                a row without a finite maximum.
        """
        self._check_step(logits)
        state = self._state
        log_probs = torch.log_softmax(logits.detach().to(torch.float32), dim=-1)
        sums = (log_probs + state.scores.to(logits.device)[:, None]).reshape(-1)
        candidates = torch.topk(sums, self._num_candidates)
        scores, flat = candidates.values.cpu(), candidates.indices.cpu()
        parents, tokens = flat // logits.shape[1], flat % logits.shape[1]
        num_new_tokens = state.num_new_tokens + 1
        is_last = num_new_tokens >= self.max_new_tokens
        is_end = [is_last or token in self.eos_token_ids for token in tokens.tolist()]
        ends = torch.tensor(is_end, dtype=torch.bool, device="cpu")
        texts = [
            (*state.running[parent], token) for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True)
        ]

        # Candidates that ended are last choices, not none: there may be too few others in a tiny vocabulary.
        running_scores = scores + ends.to(torch.float32) * _NOT_YET
        chosen = torch.topk(running_scores, self.num_beams).indices
        finished = self._finished_with(scores, ends, texts)
        running, scores = tuple(texts[row] for row in chosen.tolist()), running_scores[chosen]
        is_done = is_last or self._has_enough(num_new_tokens, scores, finished)
        step = BeamStep(parents[chosen].to(logits.device), tokens[chosen].to(logits.device))
        self._state = _State(num_new_tokens, scores, running, finished, is_done)
        return step

    def best(self) -> list[Hypothesis]:
        """The finished hypotheses, best first, at most num_return_sequences; before the end, those found so far.

        A search that is done has as many, except where the vocabulary allows no num_beams different continuations, or
        where the penalty puts their scores under -1e9.
        """
        finished = self._state.finished
        rows, scores = finished.flags.nonzero().flatten().tolist(), finished.scores.tolist()
        return [Hypothesis(finished.token_ids[row], scores[row]) for row in rows][: self.num_return_sequences]

    def _check_step(self, logits: torch.Tensor) -> None:
        if self.is_done:
            raise ValueError("step must not be called on a search that is done, got a further step. Take best().")
        Shapes(B=self.num_beams).check("logits", logits, "B V")
        check_floating("logits", logits)
        fewest = self._num_candidates // self.num_beams
        if logits.shape[1] < fewest:
            raise ValueError(
                f"logits must be of at least {fewest} tokens (with {len(self.eos_token_ids)} EOS), "
                f"got {logits.shape[1]}."
            )
        # NaN spreads to the maximum; a row of -inf alone, or one with +inf, has no most likely token either.
        highest = logits.detach().amax(dim=-1)
        is_broken = ~torch.isfinite(highest)
        if bool(is_broken.any()):
            row = int(is_broken.int().argmax())
            raise FloatingPointError(f"logits of beam {row} must have a finite maximum, got {float(highest[row])}.")

    def _finished_with(self, scores: torch.Tensor, ends: torch.Tensor, texts: list[tuple[int, ...]]) -> _Finished:
        """The hypotheses with candidates that ended, where they are among the likeliest and beat those so far."""
        before = self._state.finished
        is_finished = ends.clone()
        is_finished[self.num_beams :] = False
        penalised = scores / (self.num_new_tokens + 1) ** self._length_penalty
        penalised = penalised + (~is_finished).to(torch.float32) * _NOT_YET
        merged = torch.cat((before.scores, penalised))
        flags = torch.cat((before.flags, is_finished))
        token_ids = before.token_ids + texts
        best = torch.topk(merged, self.num_beams).indices
        return _Finished(merged[best], flags[best], [token_ids[row] for row in best.tolist()])

    def _has_enough(self, num_new_tokens: int, scores: torch.Tensor, finished: _Finished) -> bool:
        """Whether the finished hypotheses will do: all are there, and the best running beam seems to gain nothing."""
        if self._early_stopping is True and bool(finished.flags.all()):
            return True
        looks_ahead = self._early_stopping == "never" and self._length_penalty > 0
        length = self.max_new_tokens if looks_ahead else num_new_tokens
        attainable = scores[0] / length**self._length_penalty
        return not bool(attainable > finished.scores.min())


def _not_yet(num_beams: int) -> torch.Tensor:
    return torch.full((num_beams,), _NOT_YET, dtype=torch.float32, device="cpu")


def _checked_int(name: str, value: Any, minimum: int) -> int:
    """The value as a plain int: sums of numpy's wrap around."""
    number: int = value if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)
    check_int(name, number, minimum)
    return number


def _checked_eos(eos_token_ids: Iterable[int]) -> frozenset[int]:
    ids = eos_token_ids.tolist() if hasattr(eos_token_ids, "tolist") else eos_token_ids
    if not isinstance(ids, Iterable) or isinstance(ids, (str, bytes, bytearray)):
        raise TypeError(
            f"eos_token_ids must be several ints, got {type(eos_token_ids).__name__}. Pass (token,) for one."
        )
    return frozenset(_checked_int("each of eos_token_ids", token, minimum=0) for token in ids)


def _checked_early_stopping(early_stopping: EarlyStopping) -> EarlyStopping:
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(f"early_stopping must be True, False or 'never', got {early_stopping!r}.")
    return early_stopping


def _checked_length_penalty(length_penalty: Any, max_new_tokens: int) -> float:
    """The penalty as a float; refuses one by which the longest text would be divided by 0 or infinity."""
    if isinstance(length_penalty, bool) or not isinstance(length_penalty, _REAL):
        raise TypeError(f"length_penalty must be a number, got {type(length_penalty).__name__}.")
    limit = math.log(torch.finfo(torch.float32).max)
    try:
        penalty = float(length_penalty)
    except OverflowError:
        penalty = math.inf if length_penalty > 0 else -math.inf
    if not abs(penalty * math.log(max_new_tokens)) < limit:
        raise ValueError(
            f"length_penalty must keep max_new_tokens ** length_penalty a float32 above 0, got {penalty:g} "
            f"with max_new_tokens {max_new_tokens}."
        )
    return penalty
