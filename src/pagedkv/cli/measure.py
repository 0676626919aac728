"""Runs the demo's requests through the engine and notes what happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..engine import Engine, EngineStats, Request, RequestResult, SamplingParams

__all__ = ["EngineRun", "run_engine"]


@dataclass(frozen=True)
class EngineRun:
    """One run of the engine, measured; `stats` are the engine's own counters over exactly this run."""

    results: tuple[RequestResult, ...]
    stats: EngineStats
    total_s: float
    bytes_per_token: int

    @property
    def contiguous_bytes(self) -> int:
        """What one exactly filled contiguous cache a request would hold at its end.

        The last token of an answer is never fed back, so it has no keys and values; an EOS is such a token too.
        """
        lengths = (
            len(result.prompt_ids) + max(len(result.token_ids) - (result.finish_reason != "stop"), 0)
            for result in self.results
        )
        return sum(lengths) * self.bytes_per_token

    @property
    def peak_bytes(self) -> int:
        """Bytes of the pages that sequences named when they named the most."""
        return self.stats.peak_pages_used * self.stats.page_size * self.bytes_per_token


def run_engine(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    on_step: Callable[[Sequence[Request]], None] | None = None,
) -> EngineRun:
    """Submits all prompts at once, greedy, and steps until all are answered.

    on_step: gets all requests after each step; its time is not in the engine's figures.
    When: the engine is idle. Its counters start over, its prefix cache is kept.
    """
    engine.reset_stats()
    params = SamplingParams(max_new_tokens=max_new_tokens)
    started = time.perf_counter()
    requests = [engine.submit(list(prompt), params) for prompt in prompts]
    shown_s = 0.0
    while engine.has_work:
        engine.step()
        if on_step is not None:
            before = time.perf_counter()
            on_step(requests)
            shown_s += time.perf_counter() - before
    total_s = time.perf_counter() - started - shown_s
    results = tuple(request.result() for request in requests)
    return EngineRun(results, engine.stats(), total_s, engine.pool.spec.bytes_per_token)
