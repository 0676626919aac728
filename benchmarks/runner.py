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

__all__ = ["Figure", "Floor", "run_case"]

_BUDGET_S, _QUICK_BUDGET_S = 4.0, 0.5
_MIN_ROUNDS, _SLOW_ROUNDS = 5, 3


@dataclass(frozen=True)
class Floor:
    """How long the work of a case takes at the rate of one probe, in rounds with the figures held against it."""

    limit: str
    probe: str
    rate: float
    rate_unit: str
    ms: float


@dataclass(frozen=True)
class Figure:
    """One contender on one case: median and spread of a call, and how near it comes to the floors of its rounds.

    floors: highest first; `times_floor` is the median as a multiple of that one, 0 without any.
    """

    op: str
    shape: str
    who: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    rate: float
    rate_unit: str
    floors: tuple[Floor, ...]
    times_floor: float
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
    probes = [probe(ceiling) for ceiling in case.ceilings]
    runs = {**case.contenders, **{ceiling.name: ceiling.run for ceiling in probes}}
    times = _time_in_turns(runs, _QUICK_BUDGET_S if quick else _BUDGET_S)
    del runs
    figures = _figures(spec, case, _floors(case, probes, times), times)
    del case, probes
    gc.collect()
    return figures


def _time_in_turns(runs: dict[str, Callable[[int], object]], budget_s: float) -> dict[str, np.ndarray]:
    """Milliseconds a run, round by round; the first two, in cold code and unmapped memory, are not counted.

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
                    times[name].append(_seconds(run, i + 2) * 1e3)
    finally:
        gc.enable()
    return {name: np.array(milliseconds) for name, milliseconds in times.items()}


def _seconds(run: Callable[[int], object], i: int) -> float:
    started = time.perf_counter()
    run(i)
    return time.perf_counter() - started


def _floors(case: Case, probes: list[Probe], times: dict[str, np.ndarray]) -> tuple[Floor, ...]:
    floors = []
    for ceiling, measured in zip(case.ceilings, probes, strict=True):
        rate = measured.work / float(np.median(times[measured.name])) / 1e6
        unit = "GB/s" if measured.unit == "bytes" else "GFLOP/s"
        floors.append(Floor(measured.limit, measured.name, rate, unit, ceiling.work / rate / 1e6))
    return tuple(sorted(floors, key=lambda floor: floor.ms, reverse=True))


def _figures(spec: CaseSpec, case: Case, floors: tuple[Floor, ...], times: dict[str, np.ndarray]) -> list[Figure]:
    work = case.ceilings[0].work if case.ceilings else case.num_bytes
    in_flops = bool(case.ceilings) and case.ceilings[0].kind == "matmul"
    ours_ms = float(np.median(times[OURS])) / case.repeats
    figures = []
    for who in case.contenders:
        p10, median, p90 = (float(np.percentile(times[who], q)) / case.repeats for q in (10, 50, 90))
        figures.append(
            Figure(
                op=spec.op,
                shape=spec.shape,
                who=who,
                median_ms=median,
                p10_ms=p10,
                p90_ms=p90,
                rounds=len(times[who]),
                rate=work / median / 1e6,
                rate_unit="GFLOP/s" if in_flops else "GB/s",
                floors=floors,
                times_floor=median / floors[0].ms if floors else 0.0,
                ratio_to_ours=median / ours_ms,
            )
        )
    return figures
