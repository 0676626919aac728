"""What a caller may give as a prompt, as token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["eos_token_ids", "prompt_token_ids"]


def prompt_token_ids(prompt: Any, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids of text, of chat messages (through the tokenizer's chat template), or of ids.

    Raises: ValueError for an empty prompt, ids outside the vocabulary, text without a tokenizer; TypeError for others.
    """
    if isinstance(prompt, str):
        ids = _tokenizer_for(tokenizer, "text")(prompt)["input_ids"]
    elif _is_messages(prompt):
        tokenizer = _tokenizer_for(tokenizer, "chat messages")
        text = tokenizer.apply_chat_template([dict(m) for m in prompt], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = _plain_ids(prompt)
    if not ids:
        raise ValueError("prompt must have at least one token, got none.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(f"prompt must have token ids in 0..{vocab_size - 1} (the vocabulary), got {wrong}.")
    return tuple(ids)


def eos_token_ids(model: Any) -> frozenset[int]:
    """The ids that end a text, of the model's generation config; none when it names none."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _plain_ids(prompt: Any) -> list[int]:
    """Ids as plain ints, from a list or an array, numpy's integers included; a bool is none."""
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes, bytearray)):
        raise TypeError(f"prompt must be text, token ids or chat messages, got {type(prompt).__name__}.")
    wrong = [token for token in ids if isinstance(token, bool) or not hasattr(token, "__index__")]
    if wrong:
        raise TypeError(f"prompt must be text, token ids or chat messages, got one {type(wrong[0]).__name__} in it.")
    return [operator.index(token) for token in ids]


def _tokenizer_for(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise ValueError(f"prompt must be token ids for an engine without a tokenizer, got {what}.")
    return tokenizer


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(item, Mapping) for item in prompt)
