"""From logits to tokens: greedy, temperature, top-k and top-p, all rows of a step at once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..shapes import check_int
from .beam_search import BeamSearch, EarlyStopping

__all__ = ["SamplingParams", "sample", "seed_of"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued, how often, and when it ends.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. Top-k applies first, top-p to what is left of it.
    seed: None takes one from the engine's seed and the request's number, so that a repeated run repeats its answers.
    stop: strings that end the request; they and what follows are cut from the text. Needs a tokenizer.
    stop_token_ids: ids that end the request and are no part of it; None is the EOS of the model's generation config.
    ignore_eos: stop_token_ids end nothing.
    n:      continuations of the prompt that are sampled and returned, each with random numbers of its own that follow
            from the seed; the first is the one that n=1 gives.
    best_of: how many are sampled, those n returned whose tokens are the likeliest by their mean log-probability (of
            the model's logits, the EOS included); None is n.
    num_beams: above 1, the prompt is continued by beam search, which samples nothing and ends by stop_token_ids and
            max_new_tokens alone. length_penalty, early_stopping, num_return_sequences: see BeamSearch.
    Raises: ValueError, TypeError for values out of range, or that do not go together.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    n: int = 1
    best_of: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        check_int("max_new_tokens", self.max_new_tokens, minimum=1)
        check_int("top_k", self.top_k, minimum=0)
        if self.seed is not None:
            check_int("seed", self.seed, minimum=0)
            if self.seed >= 2**64:
                raise ValueError(f"seed must be below 2**64, got {self.seed}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (greedy) or positive and finite, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        stop: object = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(self.stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must hold strings that are not empty, got {self.stop}.")
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
            for token in self.stop_token_ids:
                check_int("each of stop_token_ids", token, minimum=0)
        self._check_continuations()

    @property
    def num_continuations(self) -> int:
        """How many are computed side by side: samples, or beams."""
        return max(self.num_beams, self.n if self.best_of is None else self.best_of)

    @property
    def num_returned(self) -> int:
        """How many of them the result has."""
        return self.num_return_sequences if self.num_beams > 1 else self.n

    def beam_search(self, max_new_tokens: int, eos_token_ids: Iterable[int]) -> BeamSearch:
        """The search that num_beams and its options ask for."""
        return BeamSearch(
            self.num_beams,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            num_return_sequences=self.num_return_sequences,
        )

    def _check_continuations(self) -> None:
        check_int("n", self.n, minimum=1)
        if self.best_of is not None:
            check_int("best_of", self.best_of, minimum=1)
            if self.best_of < self.n:
                raise ValueError(f"best_of must be at least {self.n} (n), got {self.best_of}.")
        check_int("num_beams", self.num_beams, minimum=1)
        self.beam_search(self.max_new_tokens, ())
        num_samples = self.n if self.best_of is None else self.best_of
        if self.num_beams == 1:
            if num_samples > 1 and self.is_greedy:
                name = "n" if self.best_of is None else "best_of"
                raise ValueError(
                    f"{name} must be 1 for temperature 0, where all continuations are the same, got {num_samples}. "
                    "Set a temperature."
                )
        elif num_samples > 1:
            raise ValueError(f"n and best_of must be 1 for a beam search, got {num_samples}. Use num_return_sequences.")
        elif not self.is_greedy:
            raise ValueError(f"temperature must be 0 for a beam search, got {self.temperature}.")
        elif self.stop:
            raise ValueError(f"stop must be empty for a beam search, got {self.stop}. Use stop_token_ids.")

    @property
    def is_greedy(self) -> bool:
        """True when no random number is drawn."""
        return self.temperature == 0


def seed_of(seed: int, index: int) -> int:
    """The seed of one continuation: that of its request for the first; the others' have nothing to do with it."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest(), "little")


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> list[int]:
    """One token a row.

    Shapes: logits [R, V] floating; params and generators: R of each, a generator for each row that is not greedy.
    Rule:   a row's token depends on its logits, its params and one number drawn from its generator, never on other
            rows: of the tokens that top-k and top-p keep, the first at which the summed probability, in order of token
            id, passes the number drawn. Tokens that tie with the last one kept are kept.
    """
    tokens: list[int] = torch.argmax(logits, dim=-1).tolist()
    rows = [row for row, chosen in enumerate(params) if not chosen.is_greedy]
    if not rows:
        return tokens
    draws = torch.tensor(
        [float(torch.rand((), dtype=torch.float64, generator=generators[row])) for row in rows],
        dtype=torch.float64,
        device=logits.device,
    )
    chosen = _draw(logits[rows], [params[row] for row in rows], draws)
    for row, token in zip(rows, chosen.tolist(), strict=True):
        tokens[row] = token
    return tokens


def _draw(logits: torch.Tensor, params: list[SamplingParams], draws: torch.Tensor) -> torch.Tensor:
    temperature = torch.tensor([chosen.temperature for chosen in params], dtype=torch.float64, device=logits.device)
    # Shifted by the maximum first, so that a tiny temperature cannot overflow.
    logits = logits.double()
    probabilities = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None], dim=-1)
    for row, chosen in enumerate(params):
        if 0 < chosen.top_k < logits.shape[1]:
            lowest = torch.topk(probabilities[row], chosen.top_k).values[-1]
            probabilities[row].masked_fill_(probabilities[row] < lowest, 0.0)
        if chosen.top_p < 1:
            lowest = _top_p_threshold(probabilities[row], chosen.top_p)
            probabilities[row].masked_fill_(probabilities[row] < lowest, 0.0)
    sums = probabilities.cumsum(dim=-1)
    # Scaled by the sum itself: the last one may be a rounding away from the 1 it should be.
    tokens = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True).squeeze(1)
    # A product that rounds up to the whole sum means the last token that was kept.
    last_kept = logits.shape[1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(tokens, last_kept)


# The few tokens that make up top_p are almost always among these; sorting the whole vocabulary costs 10 times as much.
_FIRST_CANDIDATES = 1024


def _top_p_threshold(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The probability of the last token of the smallest set that reaches top_p of what is left."""
    wanted = top_p * probabilities.sum()
    for count in (min(_FIRST_CANDIDATES, probabilities.shape[0]), probabilities.shape[0]):
        highest = torch.topk(probabilities, count).values
        reached = (highest.cumsum(0) >= wanted).nonzero()
        if reached.numel():
            return highest[reached[0, 0]]
    return highest[-1]
