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
    """A line a contender."""
    first = figures[0]
    ceiling = f"   (ceiling: {first.ceiling}, {first.ceiling_rate:.1f} {first.rate_unit})" if first.ceiling else ""
    print(f"\n{first.op}/{first.shape}{ceiling}")
    for figure in figures:
        line = f"  {figure.who:<24}{_ms(figure.median_ms):>10} ms  {f'{_ms(figure.p10_ms)}-{_ms(figure.p90_ms)}':>17}"
        if figure.rate:
            line += f"{figure.rate:>9.1f} {figure.rate_unit}"
        if figure.ceiling:
            line += f"{figure.fraction_of_ceiling:>7.0%}"
        print(line + f"{figure.ratio_to_ours:>8.2f}x", flush=True)


def write_json(path: Path, machine: dict[str, Any], figures: list[Figure]) -> None:
    """Everything measured, with where and when."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": machine, "figures": [figure.to_json() for figure in figures]}, indent=1) + "\n"
    )


def _ms(milliseconds: float) -> str:
    """Four significant digits, down to nanoseconds."""
    return (
        f"{milliseconds:.1f}"
        if milliseconds >= 100
        else f"{milliseconds:.3f}"
        if milliseconds >= 0.1
        else f"{milliseconds:.5f}"
    )
