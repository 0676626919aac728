"""What becomes of computed tokens: texts that grow and end, requests that end with them, and callers who are told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..management.manager import KVCacheManager
from .beam_group import advance_beams, found_endings
from .continuation import Continuation, Ending, FinishReason
from .request import Request, TokenEvent
from .runner import StepOutput
from .scheduler import Scheduler

__all__ = ["Answers"]


class Answers:
    """Takes up the tokens of a step, and ends continuations and requests.

    on_end: is called with each request when it has ended, before its caller is told.
    """

    def __init__(
        self, scheduler: Scheduler, manager: KVCacheManager, tokenizer: Any, on_end: Callable[[Request], None]
    ) -> None:
        self._scheduler = scheduler
        self._manager = manager
        self._tokenizer = tokenizer
        self._on_end = on_end

    def accept(self, output: StepOutput) -> None:
        """Takes up all tokens of a step; what goes wrong with one is the answer of its request.

        Raises: what is no Exception, such as an interrupt in a callback, after the others' tokens are taken up.
        """
        interruption: BaseException | None = None
        accepts = [
            *((each.continuation.request, partial(self._accept_token, *each)) for each in output.tokens),
            *((each.request, partial(self._accept_beams, *each)) for each in output.beams),
        ]
        for request, accept in accepts:
            if request.finished:
                continue
            try:
                accept()
            except Exception as error:  # noqa: BLE001 - a tokenizer's error is the answer of the request it happened in
                self.finish(request, "error", error)
            except BaseException as error:  # noqa: BLE001 - the tokens of the others are computed: they are taken first
                interruption = interruption or error
        if interruption is not None:
            raise interruption

    def finish(self, request: Request, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends a request with all its continuations; beams that are not at their end have no text."""
        if request.finished:
            return
        self._scheduler.remove(request)
        request.error = error
        if request.search is not None:
            request.continuations = [Continuation(request, 0)]
        self._end(request, [Ending(continuation, reason) for continuation in request.live])

    def _accept_token(self, continuation: Continuation, token: int, logprob: float) -> None:
        """Adds a sampled token, tells the caller, and ends the continuation where it ends."""
        request = continuation.request
        if math.isnan(request.first_token_at):
            request.first_token_at = time.perf_counter()
        continuation.weigh(logprob)
        if token in request.stop_ids:
            self._end(request, [Ending(continuation, "stop")])
            return
        text, is_stopped = continuation.push(token)
        if is_stopped or continuation.num_new_tokens >= request.max_new_tokens:
            self._end(request, [Ending(continuation, "stop" if is_stopped else "length", (token,), text)])
        else:
            self._emit(continuation, (token,), text)

    def _accept_beams(self, request: Request, logits: torch.Tensor) -> None:
        """Lets the beams go on; when their search is done, tells the caller what it found."""
        search = request.search
        assert search is not None  # beams have one
        if not search.is_done:  # an interrupt may have come right after it was
            advance_beams(request, logits, self._manager)
        if search.is_done:
            endings = found_endings(request, self._tokenizer)
            request.first_token_at = time.perf_counter()
            request.give_pages_back()
            request.continuations = [ending.continuation for ending in endings]
            self._end(request, endings)

    def _end(self, request: Request, endings: list[Ending]) -> None:
        """Ends continuations, and the request with the last of them, before the caller is told."""
        texts = [ending.text + self._close_text(ending) for ending in endings]
        if not request.live:
            self._scheduler.remove(request)
            request.status, request.finished_at = "finished", time.perf_counter()
            self._on_end(request)
        for ending, text in zip(endings, texts, strict=True):
            self._emit(ending.continuation, ending.token_ids, text)
        if request.error is not None:
            self.finish(request, "error", request.error)

    def _close_text(self, ending: Ending) -> str:
        """Closes a continuation: what the detokenizer held back, added to the text; a stop string may end in it."""
        continuation, reason, rest = ending.continuation, ending.reason, ""
        try:
            rest, is_stopped = continuation.flush()
            if is_stopped and reason == "length":
                reason = "stop"
        except Exception as error:  # noqa: BLE001 - a tokenizer's error is the request's answer
            if continuation.request.error is None:
                reason, continuation.request.error = "error", error
        continuation.finish_reason = reason
        continuation.close()
        return rest

    def _emit(self, continuation: Continuation, token_ids: tuple[int, ...], text: str) -> None:
        request = continuation.request
        if request.on_token is None:
            return
        reason = continuation.finish_reason
        event = TokenEvent(request, token_ids, text, continuation.finished, reason, continuation.index)
        try:
            request.on_token(event)
        except Exception as error:  # noqa: BLE001 - a caller's error is its own request's answer
            request.on_token = None
            if request.finished:
                request.error = error
            else:
                self.finish(request, "error", error)
