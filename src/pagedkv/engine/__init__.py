"""Continuous batching over one paged pool: the engine behind the command line, usable by itself.

Needs the extra `transformers`.
"""

from __future__ import annotations

from .engine import Engine
from .request import Request, RequestResult, RequestTimings, TokenEvent
from .sampling import SamplingParams
from .stats import EngineStats, StepReport

__all__ = [
    "Engine",
    "EngineStats",
    "Request",
    "RequestResult",
    "RequestTimings",
    "SamplingParams",
    "StepReport",
    "TokenEvent",
]
