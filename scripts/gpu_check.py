"""Checks the GPU back end on the device of this machine, then measures it; each step is reported, whatever others do.

Needs torch, Triton and numpy; pytest for one step. No network, no native core. Results are written as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_check_cases import run_shard, shards_of, sorted_verdicts

ROOT = Path(__file__).resolve().parent.parent

STEPS = ("environment", "import", "conformance", "benchmark", "tests")
# Instead of these, when it is asked for.
TUNE = "tune"
# Of the time that is left when a step begins, how much it may take.
_SHARES = {"environment": 0.2, "import": 0.2, "conformance": 0.45, "benchmark": 0.75, "tests": 0.97, TUNE: 0.97}
# Older ones lack what kernels and the interpreter's corrections are written for.
_OLDEST_TRITON = (3, 4)
_OLDEST_INTERPRETER = (3, 6)  # that the corrections are for

_MOST_PROCESSES = 16
_MOST_SHOWN = 25


@dataclass
class Run:
    """What one check was asked, and where its results go."""

    options: argparse.Namespace
    environment: dict[str, str]
    json_path: Path
    deadline: float
    document: dict[str, Any]

    def time_for(self, step: str) -> float:
        """Seconds that the step may take from now on."""
        return max(self.deadline - time.monotonic(), 1.0) * _SHARES[step]

    def keep(self) -> None:
        """Writes what there is; a run that is killed leaves it."""
        beside = self.json_path.with_suffix(".part")
        beside.write_text(json.dumps(self.document, indent=1) + "\n")
        beside.replace(self.json_path)


def main(arguments: list[str] | None = None) -> int:
    """Runs the steps; 1 when any of them failed."""
    options = _options(arguments)
    started = time.monotonic()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    described = _described()
    json_path = _json_path(options, described)
    run = Run(options, _environment_of(options), json_path, started + options.budget_s, {"steps": {}})
    run.keep()
    print(f"results: {json_path}", flush=True)
    for name in (*STEPS, TUNE):
        if name not in options.steps:
            continue
        began = time.monotonic()
        try:
            verdict, details = _STEPS[name](run, described)
        except Exception as error:  # noqa: BLE001 - the other steps are still to be made
            verdict, details = "failed", {"words": f"{type(error).__name__}: {error}"}
        seconds = round(time.monotonic() - began, 1)
        if name in ("benchmark", TUNE):
            run.document = {**json.loads(run.json_path.read_text()), "steps": run.document["steps"]}
            run.document.pop("at", None)
        run.document["steps"][name] = {"verdict": verdict, "seconds": seconds, **details}
        run.keep()
        print(f"== {name}: {verdict} ({seconds} s) {details.get('words', '')}".rstrip(), flush=True)
    _print_summary(run)
    failed = [name for name, step in run.document["steps"].items() if step["verdict"] == "failed"]
    print(f"results: {run.json_path}\n{'FAILED: ' + ', '.join(failed) if failed else 'all steps passed'}")
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=540.0, help="end within so many seconds (default: 540)")
    parser.add_argument("--steps", nargs="+", choices=[*STEPS, TUNE], default=list(STEPS), help="default: all but tune")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="default: benchmarks/results/<gpu>-<date>.json, in $OUT"
    )
    parser.add_argument("--ops", nargs="+", metavar="OP", help="of the conformance suite (default: all)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="benchmark cases whose names contain TEXT")
    parser.add_argument("--hang-s", type=float, default=90.0, help="a case that takes longer has failed (default: 90)")
    parser.add_argument("--commit", help="what the results name where there is no git")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--dry-run", action="store_true", help="interpreted, tiny, on the CPU: does the script work?")
    parser.add_argument("--most-cases", type=int, default=10**6, metavar="N", help="of each op, for a look")
    return parser.parse_args(arguments)


def _environment_of(options: argparse.Namespace) -> dict[str, str]:
    """What the processes of the steps get."""
    environment = {"TRITON_CACHE_DIR": str(_writable(ROOT / "build" / "triton-gpu")), **os.environ}
    environment |= {"PAGEDKV_COMMIT": options.commit} if options.commit else {}
    environment.pop("PAGEDKV_DEBUG", None)  # each step decides: it makes launches wait
    if not list((ROOT / "src/pagedkv/_native").glob("*pagedkv_cpuinfo*")):
        environment.setdefault("PAGEDKV_NATIVE", "0")  # without its warning: nobody expects the core here
    return environment


def _writable(folder: Path) -> Path:
    """The folder, or a temporary one where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="pagedkv-"))


def _json_path(options: argparse.Namespace, described: dict[str, Any]) -> Path:
    if options.json:
        return _writable(options.json.absolute().parent) / options.json.name
    if options.dry_run:
        return _writable(ROOT / "build") / "gpu-check-dry-run.json"
    gpu = re.sub(r"[^a-z0-9]+", "-", str(described.get("gpu") or "no-gpu").lower()).strip("-")
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    date += "-tune" if TUNE in options.steps else ""
    folder = _writable(Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"))
    names = (f"{gpu}-{date}{'' if number == 1 else f'-{number}'}.json" for number in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def _described() -> dict[str, Any]:
    """Versions and device; None for what is not there."""
    described: dict[str, Any] = {"python": platform.python_version()}
    for name in ("torch", "numpy", "triton", "pytest", "apache-tvm-ffi", "flashinfer-python"):
        described[name] = None
        for distribution in (name, f"pytorch-{name}", f"pytorch-{name}-rocm"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                described[name] = described[name] or metadata.version(distribution)
    # Triton builds its launchers with a C compiler, at the first launch of each.
    described["C compiler"] = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    described["Python.h"] = str(header) if header.exists() else None
    try:
        import torch

        gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    except Exception as error:  # noqa: BLE001 - a broken installation is a result
        return {**described, "gpu": None, "words": f"{type(error).__name__}: {error}"}
    if gpu is None:
        return {**described, "gpu": None}
    capability = getattr(gpu, "gcnArchName", "") or f"{gpu.major}.{gpu.minor}"
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    memory = round(gpu.total_memory / 2**30, 1)
    return {**described, "gpu": gpu.name, "capability": capability, "runtime": runtime, "memory GiB": memory}


def _environment(run: Run, described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    print(", ".join(f"{name} {value}" for name, value in described.items()), flush=True)
    needed = ("torch", "numpy", "triton", *(() if run.options.dry_run else ("gpu", "C compiler", "Python.h")))
    missing = [name for name in needed if not described.get(name)]
    words = f"missing: {', '.join(missing)}. {described.get('words', '')}".strip() if missing else ""
    version = tuple(int(number) for number in re.findall(r"\d+", described["triton"] or "")[:2])
    oldest = _OLDEST_INTERPRETER if run.options.dry_run else _OLDEST_TRITON
    if version and version < oldest:
        words = (
            f"triton {described['triton']} is too old, at least {'.'.join(map(str, oldest))} is needed. {words}".strip()
        )
    return ("failed" if words else "passed"), {**described, "words": words}


def _import(run: Run, described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    import pagedkv

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that the native core is missing
        status = pagedkv.backends()
    reasons = {name: "ok" if each.available else each.reason for name, each in status.items()}
    words = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
    is_there = reasons.get(run.options.backend) == "ok"
    return ("passed" if is_there else "failed"), {"words": words, "backends": reasons}


def _conformance(run: Run, described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """All cases, in processes side by side; one that breaks its process is followed by a new one."""
    until = time.monotonic() + run.time_for("conformance")
    shards = shards_of(run.options.ops or (), run.options.most_cases)
    command = [sys.executable, str(ROOT / "scripts" / "gpu_conformance.py"), "--backend", run.options.backend]
    command += ["--device", "cpu" if run.options.dry_run else "cuda"]
    # Without the switch the kernels trust slots and page ids, and refuse nothing.
    environment, limits = {**run.environment, "PAGEDKV_DEBUG": "1"}, {"until": until, "hang_s": run.options.hang_s}
    verdicts: dict[str, tuple[str, str]] = {}
    # A process takes half a GiB of the GPU before it has done anything.
    room = int(described.get("memory GiB", 32)) // 2
    processes = max(min(_MOST_PROCESSES, os.cpu_count() or 1, len(shards), room), 1)
    with ThreadPoolExecutor(processes) as threads:
        waiting = {threads.submit(run_shard, verdicts, shard, command, environment, **limits) for shard in shards}
        while waiting:
            done, waiting = wait(waiting, timeout=5.0)
            for future in done:
                future.result()
            run.document["steps"]["conformance"] = {"verdict": "unfinished", **sorted_verdicts(verdicts)}
            run.keep()
    details = sorted_verdicts(verdicts)
    counts = f"{details['passed']} passed, {len(details['failed'])} failed, {len(details['not offered'])} not offered"
    counts += f", {len(details['not run'])} not run for lack of time" if details["not run"] else ""
    is_right = details["passed"] and not details["failed"] and not details["not run"]
    return ("passed" if is_right else "failed"), {"words": counts, **details}


def _tests(run: Run, described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    folder = ROOT / "tests" / "gpu"
    if not list(folder.glob("test_*.py")):
        return "skipped", {"words": "there is no tests/gpu"}
    if importlib.util.find_spec("pytest") is None:
        return "skipped", {"words": "pytest is not installed"}
    # The project's own options name plugins that may be missing.
    command = [sys.executable, "-m", "pytest", str(folder), "-o", "addopts=", "-q", "--maxfail=10"]
    command += ["-p", "no:cacheprovider", "--tb=short", "-rs", "-W", "default"]
    if "conformance" in run.options.steps:  # made already, side by side
        command += ["--ignore", str(folder / "test_gpu_conformance.py")]
    # Poisoned memory comes with torch's deterministic mode, in which cuBLAS wants this said.
    environment = {**run.environment, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = _finished(command, run.time_for("tests"), environment)
    lines = [line for line in done.stdout.strip().splitlines() if line.strip()]
    if done.returncode:
        print(_last(done, 3000))
    words = lines[-1] if lines else _last(done)
    has_run = " passed" in words
    verdict = "failed" if done.returncode else "passed" if has_run else "skipped" if run.options.dry_run else "failed"
    return verdict, {"words": words[:300], "log": _last(done, 6000)}


def _benchmark(run: Run, described: dict[str, Any], *, tunes: bool = False) -> tuple[str, dict[str, Any]]:
    left = run.time_for(TUNE if tunes else "benchmark")
    # It ends what it is at by itself when a tenth more, or 20 s, have gone by.
    budget_s = min(left / 1.1, max(left - 25.0, 1.0))
    command = [sys.executable, "-u", "-m", "benchmarks.gpu", "--json", str(run.json_path)]
    command += ["--budget-s", str(budget_s), "--backend", run.options.backend]
    command += ["--dry-run"] if run.options.dry_run else []
    command += ["--tune"] if tunes else []
    for text in run.options.only or ():
        command += ["--only", text]
    try:
        code = subprocess.run(command, cwd=ROOT, env=run.environment, timeout=left + 30.0).returncode
    except subprocess.TimeoutExpired:
        return "failed", {"words": "ran out of time; what was measured is kept"}
    document = json.loads(run.json_path.read_text())
    figures, failed = document.get("figures", []), document.get("failed", {})
    words = f"{len(figures)} figures, {len(failed)} cases failed, {len(document.get('left_out', []))} left out"
    missed = sorted({each["case"] for each in figures if each.get("is_reached") is False})
    words += f"; targets missed: {', '.join(missed)}" if missed and not run.options.dry_run else ""
    is_done = code == 0 and figures
    return ("passed" if is_done else "failed"), {"words": words if code in (0, 1) else f"exit status {code}; {words}"}


def _tune(run: Run, described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return _benchmark(run, described, tunes=True)


_STEPS: dict[str, Callable[[Run, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "environment": _environment,
    "import": _import,
    "conformance": _conformance,
    "benchmark": _benchmark,
    "tests": _tests,
    TUNE: _tune,
}


def _print_summary(run: Run) -> None:
    """A line a case: what to quote, with the target and the others of its rounds beside it."""
    figures = run.document.get("figures", [])
    if figures:
        print(f"\n{'case':<58}{'ms':>10}{'rate':>17}{'of ceiling':>11}  target; others, ms")
    for name, of_case in itertools.groupby(figures, key=lambda figure: figure["case"]):
        line, others = "", []
        for figure in of_case:
            is_ceiling = "rate" in figure and "share" not in figure
            if name == "ceilings":
                print(f"{figure['who']:<58}{_short(figure)}")
            elif figure["who"] == "pagedkv":
                line = f"{name:<58}{_short(figure)}"
            elif not is_ceiling:
                others.append(f"{figure['who']} {figure['median_ms']:.4f}")
        if line:
            print("; ".join([line, *others]))
    for name, words in run.document.get("failed", {}).items():
        print(f"{name:<58}  FAILED {words[:200]}")
    failed = run.document["steps"].get("conformance", {}).get("failed", {})
    print()
    for name, words in list(failed.items())[:_MOST_SHOWN]:
        print(f"failed {name}: {words[:200]}")
    if len(failed) > _MOST_SHOWN:
        print(f"and {len(failed) - _MOST_SHOWN} more, in the results")
    for name, step in run.document["steps"].items():
        print(f"{name:<14}{step['verdict']:<9}{step['seconds']:>7} s  {step.get('words', '')[:400]}".rstrip())


def _short(figure: dict[str, Any]) -> str:
    words = f"{figure['median_ms']:>10.4f}"
    words += f"{figure['rate']:>9.1f} {figure['unit']:<7}" if "rate" in figure else " " * 17
    words += f"{figure['share']:>11.1%}" if "share" in figure else " " * 11
    if "target" in figure:
        words += f"  {figure['target']}: {figure['reached']:.2f}{'' if figure['is_reached'] else ' MISSED'}"
    return f"{words}{'  WRONG' if 'wrong' in figure else ''}".rstrip()


def _finished(command: list[str], timeout_s: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Status 124 after the timeout, with what was said until then."""
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        said = [part.decode() if isinstance(part, bytes) else part or "" for part in (error.stdout, error.stderr)]
        return subprocess.CompletedProcess(command, 124, said[0], f"{said[1]}\nran out of time")


def _last(done: subprocess.CompletedProcess[str], count: int = 600) -> str:
    return f"{done.stdout}\n{done.stderr}".strip()[-count:]


if __name__ == "__main__":
    sys.exit(main())
