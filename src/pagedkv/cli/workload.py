"""The demo's work: chat requests of different lengths behind one long system prompt, as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

__all__ = ["ChatRequest", "chat_messages", "chat_prompt_ids", "demo_requests"]


@dataclass(frozen=True)
class ChatRequest:
    """One question and the token ids of the whole prompt, system prompt and chat markup included."""

    question: str
    prompt_ids: tuple[int, ...]


def demo_requests(tokenizer: Any, num_requests: int = 16) -> list[ChatRequest]:
    """The demo's requests; with more than there are questions, the questions start over.

    The system prompt is `demo_prompts/handbook.md`, the questions are `demo_prompts/requests.json`.
    """
    prompts = resources.files(__package__) / "demo_prompts"
    handbook = (prompts / "handbook.md").read_text(encoding="utf-8").strip()
    questions: list[str] = json.loads((prompts / "requests.json").read_text(encoding="utf-8"))
    chosen = [questions[index % len(questions)] for index in range(num_requests)]
    return [ChatRequest(question, chat_prompt_ids(tokenizer, question, handbook)) for question in chosen]


def chat_messages(question: str, system: str | None = None) -> list[dict[str, str]]:
    """A chat of one user message, after a system message if there is one."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": question}]


def chat_prompt_ids(tokenizer: Any, question: str, system: str | None = None) -> tuple[int, ...]:
    """The prompt's token ids by the model's chat template; a model without one gets the plain text."""
    if getattr(tokenizer, "chat_template", None) is None:
        text = f"Question: {question}\nAnswer:"
        encoded = tokenizer(text if system is None else f"{system}\n\n{text}")
    else:
        encoded = tokenizer.apply_chat_template(chat_messages(question, system), add_generation_prompt=True)
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) or hasattr(encoded, "input_ids") else encoded
    return tuple(int(token) for token in ids)
