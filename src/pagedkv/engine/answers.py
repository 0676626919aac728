"""What becomes of computed tokens: texts that grow and end, requests that end with them, and callers who are told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..management.manager import KVCacheManager
from .beam_group import advance_beams, found_endings, take_tokens
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
        request.error = error
        ended = request.live
        if request.search is not None:
            request.give_pages_back()
            ended = [Continuation(request, 0)]
            ended[0].finish_reason = reason
            request.continuations = ended
        self._end(request, [Ending(continuation, reason) for continuation in ended])

    def resume(self, request: Request) -> None:
        """Takes up what an interrupt left half done with a request that has no pages now: its tokens count, their text
        follows from them, and it ends where they say so."""
        try:
            if request.error is not None:
                self.finish(request, "error", request.error)
            if not request.live:
                self._end(request, [])
            elif request.search is None:
                for continuation in request.live:
                    continuation.read_again()
                ends = [(continuation, continuation.why_it_ends()) for continuation in request.live]
                self._end(request, [Ending(continuation, reason) for continuation, reason in ends if reason])
            elif request.search.is_done:
                self._end_search(request)
            else:
                take_tokens(request)
        except Exception as error:  # noqa: BLE001 - as in accept
            self.finish(request, "error", error)

    def _accept_token(self, continuation: Continuation, token: int, logprob: float) -> None:
        """Adds a sampled token, tells the caller, and ends the continuation where it ends."""
        request = continuation.request
        if math.isnan(request.first_token_at):
            request.first_token_at = time.perf_counter()
        continuation.weigh(logprob)
        if token in request.stop_ids:
            self._end(request, [Ending(continuation, "stop")])
            return
        continuation.push(token)
        reason = continuation.why_it_ends()
        if reason is not None:
            self._end(request, [Ending(continuation, reason)])
        else:
            self._emit(continuation)

    def _accept_beams(self, request: Request, logits: torch.Tensor) -> None:
        """Lets the beams go on; when their search is done, tells the caller what it found."""
        search = request.search
        assert search is not None  # beams have one
        advance_beams(request, logits, self._manager)
        if search.is_done:
            self._end_search(request)

    def _end_search(self, request: Request) -> None:
        """Ends a request with what its search found."""
        endings = found_endings(request, self._tokenizer)
        request.first_token_at = time.perf_counter()
        request.give_pages_back()
        request.continuations = [ending.continuation for ending in endings]
        self._end(request, endings)

    def _end(self, request: Request, endings: list[Ending]) -> None:
        """Ends continuations, and the request with the last of them, before the caller is told."""
        for ending in endings:
            self._close_text(ending)
        if not request.live:
            # The scheduler knows it to the last, so that what is interrupted here is found there.
            request.give_pages_back()
            request.status, request.finished_at = "finished", time.perf_counter()
            self._on_end(request)
            self._scheduler.remove(request)
        for ending in endings:
            self._emit(ending.continuation)
        if request.error is not None:
            self.finish(request, "error", request.error)

    def _close_text(self, ending: Ending) -> None:
        """Closes a continuation: what the detokenizer held back, added to the text; a stop string may end in it."""
        continuation, reason = ending
        try:
            if continuation.flush() and reason == "length":
                reason = "stop"
        except Exception as error:  # noqa: BLE001 - a tokenizer's error is the request's answer
            if continuation.request.error is None:
                reason, continuation.request.error = "error", error
        continuation.finish_reason = reason
        continuation.close()

    def _emit(self, continuation: Continuation) -> None:
        request = continuation.request
        if request.on_token is None:
            return
        reason, news = continuation.finish_reason, continuation.take_news()
        event = TokenEvent(request, *news, continuation.finished, reason, continuation.index)
        try:
            request.on_token(event)
        except Exception as error:  # noqa: BLE001 - a caller's error is its own request's answer
            request.on_token = None
            if request.finished:
                request.error = error
            else:
                self.finish(request, "error", error)
