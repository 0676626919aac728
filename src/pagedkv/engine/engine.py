"""Continuous batching of one model over one paged pool."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from ..integrations.transformers import PagedModel
from ..kernels.backend import backends
from ..management.manager import KVCacheManager
from ..management.radix_cache import Namespace, namespace_key
from ..management.step_batch import StepBatch
from ..shapes import check_choice, check_int
from ..spec import KVCacheSpec
from ..storage.pool import KVPool
from .answers import Answers
from .page_needs import longest_answer
from .prompts import eos_token_ids, prompt_token_ids
from .request import OnToken, Request, RequestResult
from .runner import StepRunner
from .sampling import SamplingParams, seed_of
from .schedule import Schedule, Work, reserve
from .scheduler import Scheduler
from .stats import Counts, EngineStats, StepReport
from .text import TextStream

__all__ = ["Engine"]

_DEFAULT_POOL_BYTES = 2**30

_Result = TypeVar("_Result")


class Engine:
    """Answers requests together: each step computes prompts in chunks and one token of every request that decodes.

    num_pages: of the pool; None is room for max_num_seqs whole contexts, at most 1 GiB. kv_dtype: of the pages, any of
            KVCacheSpec, int8 and float8 too; None is the model's. max_batch_tokens: of one step, prompts and decoding
            together. max_num_seqs: continuations that run at once. seed: see SamplingParams.seed.
    Owns:   the pool and its pages. The model is not changed; between steps it is as it was.
    Threads: any may submit and cancel; one call runs at a time. `on_token` is called by the thread that steps, and may
            submit and cancel.
    Raises: UnsupportedModelError for a model that cannot run over pages; ValueError, TypeError for bad options.

    >>> from pagedkv.testing.tiny_models import byte_tokenizer, tiny_model
    >>> engine = Engine(tiny_model("llama"), byte_tokenizer(), num_pages=64)
    >>> result = engine.generate(["once upon a time"], SamplingParams(max_new_tokens=8))[0]
    >>> len(result.token_ids), result.finish_reason
    (8, 'length')
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        num_pages: int | None = None,
        page_size: int = 16,
        kv_dtype: torch.dtype | None = None,
        max_batch_tokens: int = 2048,
        max_num_seqs: int = 64,
        prefix_cache: bool = True,
        eviction: str = "lru",
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        check_int("max_batch_tokens", max_batch_tokens, minimum=1)
        check_int("max_num_seqs", max_num_seqs, minimum=1)
        check_int("seed", seed, minimum=0)
        check_choice("backend", backend, ("auto", *backends()))
        self._paged = PagedModel(model)
        self.model = model
        self.tokenizer = tokenizer
        spec = self._paged.spec(page_size, kv_dtype)
        if num_pages is None:
            num_pages = _default_num_pages(spec, self._paged.geometry.max_positions, max_num_seqs)
        self.pool = KVPool(spec, num_pages, self._paged.device)
        self.manager = KVCacheManager(self.pool, prefix_cache=prefix_cache, eviction=eviction)
        self._scheduler = Scheduler(self.manager, max_batch_tokens, max_num_seqs, shares_prefixes=prefix_cache)
        self._answers = Answers(self._scheduler, self.manager, tokenizer, self._note_end)
        self._eos = eos_token_ids(model)
        self._runner = StepRunner(self._paged, self.pool, self.manager, backend)
        self._seed = seed
        self._requests: dict[int, Request] = {}
        self._num_submitted = 0
        self._finished: list[Request] = []
        self._counts = Counts()
        self._has_forked = False
        self._lock = threading.RLock()
        self._is_busy = self._is_torn = False
        self._is_closed = False

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests without pages."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests with pages."""
        return len(self._scheduler.running)

    def submit(
        self,
        prompt: str | Sequence[int] | Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        on_token: OnToken | None = None,
        namespace: Namespace = None,
    ) -> Request:
        """Queues one request: text, token ids, or chat messages.

        namespace: with whom the prompt's pages are shared; another namespace never finds them.
        Returns: its handle. A prompt that can never fit is answered at once: finished, with the reason "error".
        Raises:  ValueError, TypeError for a prompt or params that are no request at all.
        """
        namespace_key(namespace)
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {type(params).__name__}.")
        if params.stop and self.tokenizer is None:
            raise ValueError("params.stop must be empty for an engine without a tokenizer. Pass tokenizer to Engine.")
        if params.num_continuations > self._scheduler.max_num_seqs:
            raise ValueError(
                f"params must ask for at most {self._scheduler.max_num_seqs} continuations (max_num_seqs, "
                f"max_batch_tokens), got {params.num_continuations}."
            )
        ids = prompt_token_ids(prompt, self.tokenizer, self._paged.vocab_size)
        with self._lock:
            if self._is_closed:
                raise ValueError("engine must be open for submit, got a closed one.")
            request = Request(self._num_submitted, ids, params, namespace, on_token, time.perf_counter())
            error = self._why_it_never_fits(request)
            if error is None:
                self._prepare(request)
            self._num_submitted += 1
            self._counts.num_requests += 1
            self._requests[request.id] = request
            if error is None:
                self._scheduler.add(request)
            else:
                self._answers.finish(request, "error", error)
        return request

    def step(self) -> StepReport:
        """Runs one forward pass; a report of 0 tokens when there is nothing to do.

        An error of the model is the answer of the request that causes it; all others go on and lose no token.
        """
        with self._lock:
            if self._is_busy:
                raise ValueError(
                    "step must not be called by on_token, got a call inside a step. Submit and return instead."
                )
            return self._whole(self._step)

    def run(self) -> None:
        """Steps until all requests are finished."""
        while self.has_work:
            self.step()

    def generate(
        self,
        prompts: Iterable[str | Sequence[int] | Sequence[Mapping[str, str]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_token: OnToken | None = None,
        namespace: Namespace = None,
    ) -> list[RequestResult]:
        """Submits all prompts, runs until they are finished, and returns their results in the order of the prompts."""
        if isinstance(prompts, (str, bytes, Mapping)):
            raise TypeError(f"prompts must be a list of prompts, got one {type(prompts).__name__}. Put it in a list.")
        prompts = list(prompts)
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params must be one or {len(prompts)} (one a prompt), got {len(each)}.")
        requests: list[Request] = []
        try:
            for prompt, chosen in zip(prompts, each, strict=True):
                requests.append(self.submit(prompt, chosen, on_token=on_token, namespace=namespace))
            while not all(request.finished for request in requests):
                self.step()
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise
        return [request.result() for request in requests]

    def cancel(self, request: Request | int) -> bool:
        """Ends a request with the reason "cancelled" and gives its pages back; False when it was finished already."""
        number = request.id if isinstance(request, Request) else request
        with self._lock:
            found = self._requests.get(number)
            if found is None or (isinstance(request, Request) and found is not request):
                return False
            self._whole(partial(self._answers.finish, found, "cancelled"))
            return True

    def stats(self) -> EngineStats:
        """What was measured so far."""
        with self._lock:
            pages = self.manager.stats()
            return EngineStats(
                **vars(self._counts),
                num_pages=pages.num_pages,
                page_size=pages.page_size,
                num_pages_used=pages.owned,
                num_pages_cached=pages.cached,
                num_pages_free=pages.free,
                pool_bytes=self.pool.num_bytes,
            )

    def reset_stats(self) -> None:
        """Counts from 0 again; pages, and peaks of pages named now, are not counts."""
        with self._lock:
            self._counts = Counts()
            pages = self.manager.stats()
            self._counts.add_pages_used(pages.owned)
            self._counts.add_pages_shared(pages.shared)

    def clear_prefix_cache(self) -> None:
        """Frees all pages that no running request names."""
        self.manager.evict()

    def close(self) -> None:
        """Cancels all requests and frees the pages; the engine takes no more. Idempotent."""
        with self._lock:
            self._is_closed = True
            for request in list(self._requests.values()):
                self.cancel(request)
            self._whole(self.manager.evict)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _whole(self, call: Callable[[], _Result]) -> _Result:
        """Runs a call that may be interrupted (Ctrl-C) anywhere; the next one makes good what was broken off."""
        if self._is_busy:  # called by on_token
            return call()
        try:
            self._is_busy = True
            if self._is_torn:
                self._take_back()
            self._is_torn = True
            result = call()
            self._is_torn = False
            return result
        finally:
            self._is_busy = False

    def _take_back(self) -> None:
        """Lets all requests wait, with the tokens that they have; ends those that were about to end."""
        self._scheduler.put_all_back()
        for seq in list(self.manager.ledger.live.values()):
            seq.close()  # no request has come to name it
        for request in list(self._scheduler.waiting):
            self._answers.resume(request)
            request.give_pages_back()

    def _prepare(self, request: Request) -> None:
        """Fills in what the request needs of the engine: when it ends, its random numbers and its text."""
        params, num_prompt_tokens = request.params, len(request.prompt_ids)
        pages = self.manager.num_pages, self.manager.page_size
        limits = [params.max_new_tokens, longest_answer(num_prompt_tokens, params.num_continuations, *pages)]
        if self._paged.geometry.max_positions is not None:
            limits.append(self._paged.geometry.max_positions - num_prompt_tokens)
        request.max_new_tokens = min(limits)
        if not params.ignore_eos:
            request.stop_ids = self._eos if params.stop_token_ids is None else frozenset(params.stop_token_ids)
        if params.num_beams > 1:
            request.search = params.beam_search(request.max_new_tokens, request.stop_ids)
            return
        seed = params.seed if params.seed is not None else (self._seed * 1_000_003 + request.id) % 2**64
        for continuation in request.continuations:
            if not params.is_greedy:
                continuation.generator = torch.Generator().manual_seed(seed_of(seed, continuation.index))
            if self.tokenizer is not None:
                continuation.stream = TextStream(self.tokenizer, params.stop)

    def _why_it_never_fits(self, request: Request) -> ValueError | None:
        num_tokens, capacity = len(request.prompt_ids), self.manager.num_pages * self.manager.page_size
        if num_tokens > capacity:
            return ValueError(
                f"prompt must have at most {capacity} tokens (the pool: {self.manager.num_pages} pages of "
                f"{self.manager.page_size}), got {num_tokens}."
            )
        context = self._paged.geometry.max_positions
        if context is not None and num_tokens >= context:
            return ValueError(f"prompt must be shorter than the model's context of {context} tokens, got {num_tokens}.")
        return None

    def _step(self) -> StepReport:
        started = time.perf_counter()
        schedule = self._scheduler.schedule()
        self._counts.add_admissions(schedule.admitted, started)
        self._note_pages(schedule)
        # Counted before the step: accepting a token moves the end of a request's ids.
        num_decode = sum(work.is_decode for work in schedule.works)
        num_prefill = sum(work.num_tokens for work in schedule.works) - num_decode
        for request, error in schedule.failed:
            self._answers.finish(request, "error", error)
        if schedule.batch is not None:
            self._execute(schedule.works, schedule.batch)
        seconds = time.perf_counter() - started
        self._counts.add_step(num_prefill, num_decode, len(schedule.preempted), seconds)
        finished, self._finished = tuple(self._finished), []
        return StepReport(
            num_prefill, num_decode, self.num_running, self.num_waiting, finished, tuple(schedule.preempted), seconds
        )

    def _note_pages(self, schedule: Schedule) -> None:
        """Raises the peaks of pages to what they are now."""
        manager = self.manager
        self._counts.add_pages_used(manager.num_pages - manager.num_free_pages - manager.num_evictable_pages)
        # Nothing else lets sequences name the same page, and it takes a walk over all of them to know.
        if schedule.admitted or self._has_forked:
            self._has_forked = False
            self._counts.add_pages_shared(manager.stats().shared)

    def _execute(self, works: list[Work], batch: StepBatch) -> None:
        """Computes the works together; when that fails, those of each request alone, so that the error finds it."""
        try:
            output = self._runner.run(works, batch)
        except Exception as error:  # noqa: BLE001 - whatever a model raises is the answer of a request, not the engine's end
            of_request: dict[int, list[Work]] = {}
            for work in works:
                of_request.setdefault(work.request.id, []).append(work)
            if len(of_request) == 1:
                self._answers.finish(works[0].request, "error", error)
                return
            for own in of_request.values():
                if not own[0].request.finished:  # a callback of one before may have cancelled it
                    self._execute(own, reserve(self.manager, own))
            return
        for work in works:
            self._has_forked |= work.request.fork_followers()
        self._has_forked |= bool(output.beams)
        self._answers.accept(output)

    def _note_end(self, request: Request) -> None:
        if self._requests.pop(request.id, None) is not None:
            self._counts.num_finished += 1
            self._finished.append(request)

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"Engine({name}, {self.num_running} running, {self.num_waiting} waiting, {self.manager})"


def _default_num_pages(spec: KVCacheSpec, max_positions: int | None, max_num_seqs: int) -> int:
    within_bytes = max(spec.num_pages(_DEFAULT_POOL_BYTES), 1)
    if max_positions is None:
        return within_bytes
    return min(within_bytes, max_num_seqs * -(-max_positions // spec.page_size))
