"""Checks a case, then times everyone in it in turns, so that a noisy machine is noisy for all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .case import MAX_ROUNDS, OURS, Case, CaseSpec
from .ceilings import Probe, probe

__all__ = ["Figure", "run_case"]

_BUDGET_S, _QUICK_BUDGET_S = 4.0, 0.5
_MIN_ROUNDS, _SLOW_ROUNDS = 5, 3


@dataclass(frozen=True)
class Figure:
    """One contender on one case: median and spread of a call, and how near it comes to the ceiling of its rounds."""

    op: str
    shape: str
    who: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    rate: float
    rate_unit: str
    ceiling: str
    ceiling_rate: float
    fraction_of_ceiling: float
    ratio_to_ours: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def run_case(spec: CaseSpec, quick: bool = False) -> list[Figure]:
    """All figures of a case, ours first.

    Raises: WrongResultError instead of timing a wrong op.
    """
    case = spec.build()
    case.check()
    ceiling = probe(case.ceiling, case.num_bytes)
    runs = dict(case.contenders)
    if ceiling is not None:
        runs[ceiling.name] = ceiling.run
    budget_s = _QUICK_BUDGET_S if quick else _BUDGET_S
    times = _time_in_turns(runs, budget_s, case.repeats)
    del runs
    figures = _figures(spec, case, ceiling, times)
    del case
    gc.collect()
    return figures


def _time_in_turns(runs: dict[str, Callable[[int], object]], budget_s: float, repeats: int) -> dict[str, np.ndarray]:
    """Milliseconds a call, round by round; the first two, in cold code and unmapped memory, are not counted.

    Who takes more than a second leaves after a few rounds, so that one slow peer does not take the others' rounds.
    """
    for run in runs.values():
        run(0)
    warm_s = {name: _seconds(run, 1) for name, run in runs.items()}
    slow = {name for name, seconds in warm_s.items() if seconds > 1.0}
    rounds = int(budget_s / (sum(seconds for name, seconds in warm_s.items() if name not in slow) + 1e-9))
    rounds = min(max(rounds, _MIN_ROUNDS), MAX_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.disable()
    try:
        for i in range(rounds):
            for name, run in runs.items():
                if name not in slow or i < _SLOW_ROUNDS:
                    times[name].append(_seconds(run, i + 2) * 1e3 / repeats)
    finally:
        gc.enable()
    return {name: np.array(milliseconds) for name, milliseconds in times.items()}


def _seconds(run: Callable[[int], object], i: int) -> float:
    started = time.perf_counter()
    run(i)
    return time.perf_counter() - started


def _figures(spec: CaseSpec, case: Case, ceiling: Probe | None, times: dict[str, np.ndarray]) -> list[Figure]:
    in_flops = ceiling is not None and ceiling.unit == "flops"
    work = case.num_flops if in_flops else case.num_bytes
    ours_ms = float(np.median(times[OURS]))
    ceiling_rate = 0.0
    if ceiling is not None:
        ceiling_rate = ceiling.work / (float(np.median(times[ceiling.name])) * case.repeats) / 1e6
    figures = []
    for who in case.contenders:
        p10, median, p90 = (float(np.percentile(times[who], q)) for q in (10, 50, 90))
        rate = work / median / 1e6
        figures.append(
            Figure(
                op=spec.op,
                shape=spec.shape,
                who=who,
                median_ms=median,
                p10_ms=p10,
                p90_ms=p90,
                rounds=len(times[who]),
                rate=rate,
                rate_unit="GFLOP/s" if in_flops else "GB/s",
                ceiling=ceiling.name if ceiling else "",
                ceiling_rate=ceiling_rate,
                fraction_of_ceiling=rate / ceiling_rate if ceiling_rate else 0.0,
                ratio_to_ours=median / ours_ms,
            )
        )
    return figures
