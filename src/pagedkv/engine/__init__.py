"""Continuous batching over one paged pool: the engine behind the command line, usable by itself.

Needs the extra `transformers`.
"""

from __future__ import annotations

from .beam_search import BeamSearch, BeamStep, Hypothesis
from .continuation import Continuation, ContinuationResult
from .engine import Engine
from .request import Request, RequestResult, RequestTimings, TokenEvent
from .sampling import SamplingParams
from .stats import EngineStats, StepReport
from .tile_decoder import TileDecoder

__all__ = [
    "BeamSearch",
    "BeamStep",
    "Continuation",
    "ContinuationResult",
    "Engine",
    "EngineStats",
    "Hypothesis",
    "Request",
    "RequestResult",
    "RequestTimings",
    "SamplingParams",
    "StepReport",
    "TileDecoder",
    "TokenEvent",
]
