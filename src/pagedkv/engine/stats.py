"""What an engine measures of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .request import Request

__all__ = ["Counts", "EngineStats", "StepReport"]


@dataclass(frozen=True)
class StepReport:
    """One step. `finished` counts requests that ended since the step before; `seconds` is the whole step."""

    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    finished: tuple[Request, ...]
    preempted: tuple[Request, ...]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return self.num_prefill_tokens + self.num_decode_tokens


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, or since `reset_stats`; pages as they are now.

    num_cached_tokens: prompt tokens found in the prefix cache, not computed. num_prefill_tokens: computed, those
    included that were computed again after a preemption. prefill_s and decode_s: whole steps (planning, forward pass,
    sampling, callbacks), a step that does both split in proportion to its tokens. num_pages_used: named by a running
    request; num_pages_cached: held by the prefix cache alone; shared: named by two running requests or more.
    peak_pages_used counts pages that are neither free nor evictable: those named by a running request, and pinned ones.
    """

    num_steps: int
    num_requests: int
    num_finished: int
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_prefill_tokens: int
    num_decode_tokens: int
    prefill_s: float
    decode_s: float
    num_pages: int
    page_size: int
    num_pages_used: int
    num_pages_cached: int
    num_pages_free: int
    peak_pages_used: int
    peak_pages_shared: int
    pool_bytes: int

    @property
    def hit_rate(self) -> float:
        """Part of the prompt tokens that the prefix cache had, 0 when there were none."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Computed prompt tokens a second of prefill, 0 when there was none."""
        return self.num_prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Decoded tokens a second of decoding, 0 when there was none."""
        return self.num_decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass
class Counts:
    """The counting fields of EngineStats, while they are counted."""

    num_steps: int = 0
    num_requests: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    peak_pages_used: int = 0
    peak_pages_shared: int = 0

    def add_admissions(self, admitted: list[Request], now: float) -> None:
        """Counts each request once, also when it is admitted again after a preemption."""
        for request in admitted:
            if math.isnan(request.admitted_at):
                request.admitted_at = now
                self.num_prompt_tokens += len(request.prompt_ids)
                self.num_cached_tokens += request.num_cached_tokens

    def add_pages_used(self, num_pages: int) -> None:
        """Raises the peak to what is used now."""
        self.peak_pages_used = max(self.peak_pages_used, num_pages)

    def add_pages_shared(self, num_pages: int) -> None:
        """Raises the peak to what is shared now."""
        self.peak_pages_shared = max(self.peak_pages_shared, num_pages)

    def add_step(self, num_prefill: int, num_decode: int, num_preemptions: int, seconds: float) -> None:
        """Splits a step's time over its prefill and decode tokens."""
        self.num_preemptions += num_preemptions
        num_tokens = num_prefill + num_decode
        if num_tokens:
            self.num_steps += 1
            self.num_prefill_tokens += num_prefill
            self.num_decode_tokens += num_decode
            self.prefill_s += seconds * num_prefill / num_tokens
            self.decode_s += seconds * num_decode / num_tokens
