"""Where a figure was measured: without it, it is no figure."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pagedkv
from pagedkv.kernels.cpu import native

__all__ = ["describe"]

_ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """CPU, cores, instruction set, threads, versions, commit and date."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": native.core_isa() if native.unavailable() is None else "none: reference only",
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "pagedkv": pagedkv.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in named:
            return f"{named['model name']} (family {named['cpu family']}, model {named['model']})"
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with "+changes" when the working tree differs from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return "none"
    return f"{commit}+changes" if git("status", "--porcelain") else commit
