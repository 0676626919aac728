"""Compiles the Triton kernels for GPUs that need not be there, and refuses what would run badly on them.

`python -m pagedkv.testing.triton_compile --table` shows registers, spills and shared memory of every variant.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KERNELS", "TARGETS", "CompiledVariant", "compile_variants", "main", "refusals"]

# The package whose modules are searched for `compile_variants()`.
KERNELS = "pagedkv.kernels.triton"

# Shared memory that one block may have, in bytes.
TARGETS = {"cuda:80": 166_912, "cuda:90": 232_448, "hip:gfx942": 65_536, "cuda:100": 232_448}

# One process each, side by side; within one in this order: after a kernel for sm_100 Triton 3.6 writes instructions
# for sm_80 that it does not have.
_PROCESSES = (("cuda:80", "cuda:90"), ("hip:gfx942", "cuda:100"))

# Without a word from the process for so long, what it is at is given up; a variant that spills badly takes 20 s.
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class CompiledVariant:
    """What a variant takes on a target.

    registers:     of a thread. spilled_bytes: of a thread, in local (AMD: scratch) memory. shared_bytes: of a block.
    left_out:      why it is not compiled for this target, or None.
    problem:       why it does not compile, or None.
    """

    module: str
    variant: str
    target: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0
    left_out: str | None = None
    problem: str | None = None


def compile_variants(
    modules: Sequence[str] = (KERNELS,), *, targets: Iterable[str] = TARGETS, cache_dir: Path
) -> list[CompiledVariant]:
    """Compiles the variants of the modules, each for every target, in processes of their own.

    modules:   names of modules or packages, or paths of Python files.
    cache_dir: keeps compiled kernels, so that the next time takes seconds; nothing is written elsewhere.
    Raises:    ValueError for an unknown target. A kernel that does not compile, even one that kills the compiler, is a
               `problem` of its variant.
    """
    targets = list(targets)
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise ValueError(f"targets must be among {', '.join(TARGETS)}, got {', '.join(unknown)}.")
    groups = [[target for target in group if target in targets] for group in _PROCESSES]
    groups = [group for group in groups if group]
    with ThreadPoolExecutor(len(groups)) as threads:
        done = threads.map(lambda group: _compile_in_processes(modules, group, cache_dir), groups)
    return sorted((one for part in done for one in part), key=lambda one: (one.module, one.variant, one.target))


def refusals(compiled: Iterable[CompiledVariant]) -> list[str]:
    """What is wrong with these, in words: nothing compiled, spills, too much shared memory, left out everywhere.

    The last is said of a variant that all targets are given for.
    """
    wrong: list[str] = []
    of: dict[tuple[str, str], list[CompiledVariant]] = defaultdict(list)
    for one in compiled:
        name = f"{one.module}: {one.variant} for {one.target}"
        of[one.module, one.variant].append(one)
        limit = TARGETS[one.target]
        if one.problem is not None:
            wrong.append(f"{name} does not compile: {one.problem}")
        elif one.spilled_bytes:
            wrong.append(f"{name} spills {one.spilled_bytes} bytes a thread, with {one.registers} registers.")
        if one.shared_bytes > limit:
            wrong.append(f"{name} takes {one.shared_bytes} bytes of shared memory, a block may have {limit}.")
    for (module, variant), parts in of.items():
        if len(parts) == len(TARGETS) and all(one.left_out is not None for one in parts):
            wrong.append(f"{module}: {variant} is left out for every target: {parts[0].left_out}")
    return wrong if of else ["no module has variants to compile."]


def _compile_in_processes(modules: Sequence[str], targets: list[str], cache_dir: Path) -> list[CompiledVariant]:
    """One process, and after each that a kernel has killed another one for the rest."""
    results: list[CompiledVariant] = []
    finished: list[str] = []
    while True:
        arguments = [*modules, "--targets", *targets, "--finished", json.dumps(finished)]
        started, code, words = _run_worker(arguments, cache_dir, results)
        if code == 0:
            return results
        if started is None:
            return [*results, *(CompiledVariant("", "the worker", t, problem=words) for t in targets)]
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        results.append(CompiledVariant(*started, problem=f"the compiler ended with {reason}. {words}".strip()))
        finished = [json.dumps([one.module, one.variant, one.target]) for one in results]


def _run_worker(
    arguments: list[str], cache_dir: Path, results: list[CompiledVariant]
) -> tuple[tuple[str, str, str] | None, int, str]:
    """Appends what the process finishes; gives what it was at when it ended, its exit status, and its last words."""
    temporary = cache_dir / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache_dir), "TRITON_HOME": str(cache_dir), "TMPDIR": str(temporary)}
    environment |= {"PAGEDKV_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pagedkv.testing.triton_compile_worker", *arguments]
    started: tuple[str, str, str] | None = None
    words: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # Read side by side: a compiler that has much to say must not wait for a reader.
        reader = threading.Thread(target=lambda stream: words.extend(stream), args=(process.stderr,))
        reader.start()
        clock = _started_clock(process)
        for line in process.stdout:
            clock.cancel()
            clock = _started_clock(process)
            if not line.startswith("{"):
                continue  # what a compiler prints
            message = json.loads(line)
            if message.keys() == {"started"}:
                started = tuple(message["started"])
            else:
                results.append(CompiledVariant(**message))
                started = None
        code = process.wait()
        clock.cancel()
        reader.join()
    return started, code, "".join(words[-12:]).strip()[-600:]


def _started_clock(process: subprocess.Popen[str]) -> threading.Timer:
    clock = threading.Timer(_TIMEOUT_S, process.kill)
    clock.start()
    return clock


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 when a variant is refused."""
    parser = argparse.ArgumentParser(prog="python -m pagedkv.testing.triton_compile", description=__doc__)
    parser.add_argument("--module", action="append", help="module, package or file; repeatable (default: all kernels)")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="repeatable (default: all)")
    parser.add_argument("--table", action="store_true", help="show the figures of every variant")
    parser.add_argument("--cache-dir", type=Path, default=Path("build/triton"), metavar="PATH")
    options = parser.parse_args(arguments)
    compiled = compile_variants(
        options.module or (KERNELS,), targets=options.target or TARGETS, cache_dir=options.cache_dir.resolve()
    )
    if options.table:
        print(_table(compiled))
    wrong = refusals(compiled)
    print("\n".join(wrong) if wrong else f"{len(compiled)} variants: no spills, none takes too much shared memory")
    return 1 if wrong else 0


def _table(compiled: list[CompiledVariant]) -> str:
    names = [f"{one.module.rpartition('.')[2]}: {one.variant}" for one in compiled]
    width = max(map(len, names), default=0) + 2
    lines = [f"{'kernel':<{width}}{'target':<12}{'registers':>10}{'spilled':>9}{'shared':>9}{'s':>6}"]
    for name, one in zip(names, compiled, strict=True):
        line = f"{name:<{width}}{one.target:<12}"
        if one.problem is None and one.left_out is None:
            line += f"{one.registers:>10}{one.spilled_bytes:>9}{one.shared_bytes:>9}{one.seconds:>6.1f}"
        else:
            line += f"  left out: {one.left_out}" if one.left_out is not None else "  does not compile"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
