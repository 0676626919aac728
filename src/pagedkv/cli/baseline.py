"""The same prompts through `model.generate` with transformers' own cache: what the demo is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

__all__ = ["BaselineRun", "run_generate"]


@dataclass(frozen=True)
class BaselineRun:
    """One batched `model.generate`, measured.

    answers: new token ids of each request without the EOS that ended it.
    prefill_s ends when the first logits of the whole batch reach the logits processors; decode_s is the rest.
    num_decode_tokens counts what requests got after their first token, EOS included, and not the padding after it.
    cache_bytes: keys and values the cache holds at the end, padding included.
    """

    answers: tuple[tuple[int, ...], ...]
    num_prompt_tokens: int
    num_decode_tokens: int
    prefill_s: float
    decode_s: float
    cache_bytes: int

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second, padding not counted."""
        return self.num_prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens a second after the first of each request."""
        return self.num_decode_tokens / self.decode_s if self.num_decode_tokens else 0.0


def run_generate(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> BaselineRun:
    """Greedy `model.generate` of all prompts as one left-padded batch."""
    input_ids, attention_mask = _left_padded(prompts, _pad_id(model))
    clock = _FirstLogits()
    started = time.perf_counter()
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=_greedy_config(model, max_new_tokens),
        logits_processor=LogitsProcessorList([clock]),
    )
    ended = time.perf_counter()
    eos_ids = _eos_ids(model)
    rows = [_until_eos(row, eos_ids) for row in output.sequences[:, input_ids.shape[1] :].tolist()]
    return BaselineRun(
        answers=tuple(answer for answer, _ in rows),
        num_prompt_tokens=sum(map(len, prompts)),
        num_decode_tokens=sum(num_generated - 1 for _, num_generated in rows),
        prefill_s=clock.first_at - started,
        decode_s=ended - clock.first_at,
        cache_bytes=_cache_bytes(output.past_key_values),
    )


class _FirstLogits(LogitsProcessor):  # type: ignore[misc]
    """Notes when the logits of the prompts arrive; leaves them as they are."""

    def __init__(self) -> None:
        self.first_at = float("nan")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.first_at != self.first_at:  # nan: the first call
            self.first_at = time.perf_counter()
        return scores


def _greedy_config(model: Any, max_new_tokens: int) -> Any:
    """Plain greedy search; whatever sampling or penalties the model's own configuration asks for is switched off."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(_eos_ids(model)) or None,
        pad_token_id=_pad_id(model),
        return_dict_in_generate=True,
    )


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), pad_id)
    attention_mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    return input_ids, attention_mask


def _eos_ids(model: Any) -> set[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _pad_id(model: Any) -> int:
    pad = getattr(model.generation_config, "pad_token_id", None)
    return int(pad) if pad is not None else min(_eos_ids(model), default=0)


def _until_eos(row: Sequence[int], eos_ids: set[int]) -> tuple[tuple[int, ...], int]:
    """The tokens before the first EOS, and how many were generated up to and including it."""
    for position, token in enumerate(row):
        if token in eos_ids:
            return tuple(row[:position]), position + 1
    return tuple(row), len(row)


def _cache_bytes(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
