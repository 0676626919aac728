"""Cases in a process of their own: what it is at when it crashes or hangs has failed, and a new process does the rest.

After a kernel that read or wrote outside of memory a process cannot use the GPU any more, and a kernel without end
leaves one that waits for ever.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["run_guarded", "update_json"]

_ROOT = Path(__file__).resolve().parent.parent
_POLL_S = 0.3


def run_guarded(
    arguments: Sequence[str], path: Path, environment: dict[str, str], *, budget_s: float, silence_s: float
) -> int:
    """Runs `python -m benchmarks.gpu` with these arguments, again after each case that ended it; 1 when any failed.

    path:      of the results, where the process writes as "at" what it begins.
    budget_s:  the process begins nothing later, and is ended when what it is at takes a tenth longer.
    silence_s: a process that has not written for so long hangs.
    """
    started, at = time.monotonic(), ""
    while True:
        left = max(budget_s - (time.monotonic() - started), 0.0)
        command = [sys.executable, "-u", "-m", "benchmarks.gpu", *arguments, "--inside", "--json", str(path)]
        command += ["--after", at, "--budget-s", str(left)]
        # With no time left it only names what is left out.
        code, words = _watched(command, path, environment, left + max(0.1 * budget_s, 20.0), silence_s)
        document = _read(path)
        begun = str(document.get("at", ""))
        if code not in (0, 1):
            # Not its own words for it: what it was at, or, where it began nothing new, all.
            failed = dict(document.get("failed", {}))
            failed.setdefault(begun if begun != at else f"all after {at!r}", words)
            update_json(path, {"failed": failed})
            print(f"{begun or 'the benchmark'}: {words}", flush=True)
        if code in (0, 1) or begun == at:
            return 1 if code or document.get("failed") else 0
        at = begun


def update_json(path: Path, values: dict[str, Any]) -> None:
    """Sets keys of the document at once: a run that is killed leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({**_read(path), **values}, indent=1) + "\n")
    beside.replace(path)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _watched(
    command: list[str], path: Path, environment: dict[str, str], most_s: float, silence_s: float
) -> tuple[int, str]:
    """How the process ended, in a number and in words."""
    started = heard = time.monotonic()
    written = _written(path)
    process = subprocess.Popen(command, cwd=_ROOT, env={**os.environ, **environment})
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            if _written(path) != written:
                written, heard = _written(path), time.monotonic()
            for since, seconds in ((started, most_s), (heard, silence_s)):
                if time.monotonic() - since > seconds:
                    return 124, f"did not end in {seconds:.0f} s"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode, f"its process ended with status {process.returncode}"


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
