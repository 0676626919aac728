"""Figures as a table to read and as JSON to keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .runner import Figure

__all__ = ["print_case", "print_machine", "write_json"]


def print_machine(machine: dict[str, Any]) -> None:
    """One line to quote with the figures."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['isa']}")
    print(f"commit {machine['commit']}, {machine['date']}, {versions}")


def print_case(figures: list[Figure]) -> None:
    """A line on each floor, the one that counts first, and a line a contender."""
    first = figures[0]
    print(f"\n{first.op}/{first.shape}")
    for floor in first.floors:
        print(f"  floor: {_time(floor.ms)} ({floor.limit}: {floor.probe}, {floor.rate:.1f} {floor.rate_unit})")
    for figure in figures:
        spread = f"{_time(figure.p10_ms)} - {_time(figure.p90_ms)}"
        line = f"  {figure.who:<26}{_time(figure.median_ms):>11}{spread:>25}"
        if figure.rate:
            line += f"{figure.rate:>8.1f} {figure.rate_unit}"
        if figure.floors:
            line += f"{figure.times_floor:>8.2f}x of the floor ({figure.floors[0].limit})"
        print(line + f"{figure.ratio_to_ours:>8.2f}x of ours", flush=True)


def write_json(path: Path, machine: dict[str, Any], figures: list[Figure]) -> None:
    """Everything measured, with where and when."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": machine, "figures": [figure.to_json() for figure in figures]}, indent=1) + "\n"
    )


def _time(milliseconds: float) -> str:
    """Four digits or more, in microseconds below a tenth of a millisecond."""
    if milliseconds < 0.1:
        return f"{milliseconds * 1e3:.2f} us"
    return f"{milliseconds:.1f} ms" if milliseconds >= 100 else f"{milliseconds:.3f} ms"
