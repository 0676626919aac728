"""What transformers' beam search answers to a prompt, which any other must find, whatever torch's defaults are.

Needs the extra `transformers`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .rounded_cache import RoundedCache
from .tiny_models import VOCAB_SIZE

__all__ = ["ExpectedBeams", "expected_beams", "other_defaults", "prompt_of"]


class ExpectedBeams(NamedTuple):
    """Best first.

    token_ids: each up to its first EOS. rows: the same, filled up to one length. scores: none where there is one beam.
    """

    token_ids: list[tuple[int, ...]]
    rows: list[list[int]]
    scores: list[float]


def prompt_of(num_tokens: int, seed: int) -> torch.Tensor:
    """[num_tokens] int64: the same bytes each time, whatever else draws random numbers."""
    return torch.randint(256, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def expected_beams(
    model: Any,
    prompt: torch.Tensor,
    num_beams: int,
    *,
    eos_token_ids: Collection[int] = (),
    pad_token_id: int | None = VOCAB_SIZE - 1,
    kv_dtype: torch.dtype | None = None,
    **options: Any,
) -> ExpectedBeams:
    """The new tokens of model.generate with these options, over a cache rounded to kv_dtype if it is given.

    >>> from pagedkv.testing.tiny_models import tiny_model
    >>> found = expected_beams(tiny_model("llama"), prompt_of(4, seed=0), 2, max_new_tokens=3, num_return_sequences=2)
    >>> [len(token_ids) for token_ids in found.token_ids], len(found.scores)
    ([3, 3], 2)
    """
    if kv_dtype is not None:
        options["past_key_values"] = RoundedCache(model.config, kv_dtype)
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    rows = out.sequences[:, len(prompt) :].tolist()
    scores = [] if num_beams == 1 else out.sequences_scores.tolist()
    return ExpectedBeams([_up_to_end(row, eos_token_ids) for row in rows], rows, scores)


@contextmanager
def other_defaults() -> Iterator[None]:
    """Within it, tensors made without a device are on "meta", where no number is, and those without a dtype float64.

    >>> with other_defaults():
    ...     torch.zeros(1).device, torch.zeros(1).dtype
    (device(type='meta'), torch.float64)
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def _up_to_end(row: list[int], eos_token_ids: Collection[int]) -> tuple[int, ...]:
    length = next((place + 1 for place, token in enumerate(row) if token in eos_token_ids), len(row))
    return tuple(row[:length])
