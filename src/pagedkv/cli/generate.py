"""`pagedkv generate`: one prompt, its answer streamed as it is made."""

from __future__ import annotations

from collections.abc import Callable

from ..engine import Engine, SamplingParams, TokenEvent
from ..integrations.transformers.checkpoint import load_causal_lm
from .quiet import quiet_transformers
from .workload import chat_prompt_ids

__all__ = ["stream_answer"]


def stream_answer(
    prompt: str,
    params: SamplingParams,
    write: Callable[[str], None],
    *,
    model: str | None = None,
    system: str | None = None,
    is_raw: bool = False,
    page_size: int = 16,
    on_progress: Callable[[str], None] | None = None,
) -> None:
    """Loads the model and calls `write` with each new piece of the answer.

    is_raw: the prompt is continued as it is, without the chat template.
    Raises: ValueError for an empty prompt or a model that cannot be loaded; the request's own error if it failed.
    """
    if not prompt.strip():
        raise ValueError("prompt must have text, got nothing.")
    if is_raw and system is not None:
        raise ValueError("--system must not come with --raw: a raw prompt has no roles. Put the text into the prompt.")
    with quiet_transformers():
        loaded = load_causal_lm(model, on_progress=on_progress)
        tokenizer = loaded.tokenizer
        ids = tokenizer(prompt)["input_ids"] if is_raw else chat_prompt_ids(tokenizer, prompt, system)
        with Engine(loaded.model, tokenizer, page_size=page_size, max_num_seqs=1) as engine:

            def on_token(event: TokenEvent) -> None:
                if event.text:
                    write(event.text)

            request = engine.submit(list(ids), params, on_token=on_token)
            engine.run()
            error = request.result().error
    if error is not None:
        raise error
