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
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

STEPS = ("environment", "import", "conformance", "tests", "benchmark")
# Of the time that is left when a step begins, how much it may take.
_SHARES = {"environment": 0.2, "import": 0.2, "conformance": 0.45, "tests": 0.35, "benchmark": 0.97}

# Processes an op, by what its cases cost: most of it is compiling.
_SHARDS = {"paged_attention": 10, "mla_attention": 4}
_MOST_PROCESSES = 16


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
        self.json_path.parent.mkdir(parents=True, exist_ok=True)
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
    for name in STEPS:
        if name not in options.steps:
            continue
        began = time.monotonic()
        try:
            verdict, details = _STEPS[name](run, described)
        except Exception as error:  # noqa: BLE001 - the other steps are still to be made
            verdict, details = "failed", {"words": f"{type(error).__name__}: {error}"}
        seconds = round(time.monotonic() - began, 1)
        if name == "benchmark" and run.json_path.exists():
            run.document = {**json.loads(run.json_path.read_text()), "steps": run.document["steps"]}
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
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="default: benchmarks/results/<gpu>-<date>.json, in $OUT"
    )
    parser.add_argument("--ops", nargs="+", metavar="OP", help="of the conformance suite (default: all)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="benchmark cases whose names contain TEXT")
    parser.add_argument("--hang-s", type=float, default=30.0, help="a case that runs longer when time is up has failed")
    parser.add_argument("--commit", help="what the results name where there is no git")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--dry-run", action="store_true", help="interpreted, tiny, on the CPU: does the script work?")
    parser.add_argument("--most-cases", type=int, default=10**6, metavar="N", help="of each op, for a look")
    return parser.parse_args(arguments)


def _environment_of(options: argparse.Namespace) -> dict[str, str]:
    """What the processes of the steps get."""
    environment = {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton-gpu"), **os.environ}
    environment |= {"PAGEDKV_COMMIT": options.commit} if options.commit else {}
    if not list((ROOT / "src/pagedkv/_native").glob("*pagedkv_cpuinfo*")):
        environment.setdefault("PAGEDKV_NATIVE", "0")  # without its warning: nobody expects the core here
    return environment


def _json_path(options: argparse.Namespace, described: dict[str, Any]) -> Path:
    if options.json:
        return Path(options.json)
    if options.dry_run:
        return ROOT / "build" / "gpu-check-dry-run.json"
    gpu = re.sub(r"[^a-z0-9]+", "-", str(described.get("gpu") or "no-gpu").lower()).strip("-")
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
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
    return {**described, "gpu": gpu.name, "capability": capability, "runtime": runtime}


def _environment(run: Run, described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    print(", ".join(f"{name} {value}" for name, value in described.items()), flush=True)
    needed = ("torch", "numpy", "triton", *(() if run.options.dry_run else ("gpu", "C compiler", "Python.h")))
    missing = [name for name in needed if not described.get(name)]
    words = f"missing: {', '.join(missing)}. {described.get('words', '')}".strip() if missing else ""
    return ("failed" if missing else "passed"), {"words": words, **described}


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
    shards = _shards(run.options)
    verdicts: dict[str, tuple[str, str]] = {}
    processes = min(_MOST_PROCESSES, os.cpu_count() or 1, len(shards))
    with ThreadPoolExecutor(processes) as threads:
        waiting = {threads.submit(_run_shard, run, verdicts, *shard, until) for shard in shards}
        while waiting:
            done, waiting = wait(waiting, timeout=5.0)
            for future in done:
                future.result()
            run.document["steps"]["conformance"] = {"verdict": "unfinished", **_sorted_verdicts(verdicts)}
            run.keep()
    details = _sorted_verdicts(verdicts)
    for name, words in list(details["failed"].items())[:20]:
        print(f"  failed {name}: {words[:300]}")
    counts = f"{details['passed']} passed, {len(details['failed'])} failed, {len(details['not offered'])} not offered"
    counts += f", {len(details['not run'])} not run for lack of time" if details["not run"] else ""
    is_right = details["passed"] and not details["failed"] and not details["not run"]
    return ("passed" if is_right else "failed"), {"words": counts, **details}


def _shards(options: argparse.Namespace) -> list[tuple[str, list[str], int, int]]:
    """Op, the names of its cases, and from which to which; long ops first."""
    from pagedkv.testing.conformance import conformance_cases

    names: dict[str, list[str]] = {}
    for case in conformance_cases(*options.ops or ()):
        names.setdefault(case.op, []).append(str(case))
    shards = []
    for op, cases in names.items():
        count, total = _SHARDS.get(op, 1), min(len(cases), options.most_cases)
        cuts = [total * part // count for part in range(count + 1)]
        shards += [(op, cases, start, stop) for start, stop in itertools.pairwise(cuts) if start < stop]
    return sorted(shards, key=lambda shard: -_SHARDS.get(shard[0], 1))


def _run_shard(
    run: Run,
    verdicts: dict[str, tuple[str, str]],
    op: str,
    cases: list[str],
    start: int,
    stop: int,
    until: float,
) -> None:
    """Sets the verdicts of cases[start:stop], each as it comes."""
    next_case = start
    while next_case < stop:
        left = until - time.monotonic()
        if left <= 0:
            break
        command = [sys.executable, str(ROOT / "scripts" / "gpu_conformance.py"), op, str(next_case), str(stop)]
        command += ["--backend", run.options.backend, "--device", "cpu" if run.options.dry_run else "cuda"]
        begun, began = None, 0.0
        num_lines = 0
        # Without the switch the kernels trust slots and page ids, and refuse nothing.
        process = _Process(command, {**run.environment, "PAGEDKV_DEBUG": "1"}, left)
        for line in process.lines():
            num_lines += 1
            next_case = line["number"] + 1
            begun, began = line.get("started"), time.monotonic()
            if begun is None:
                verdicts[line["case"]] = (line["verdict"], line["words"])
        if process.status == 0:
            break
        if begun is not None and time.monotonic() < until:
            verdicts[begun] = ("failed", f"its process ended with status {process.status}. {process.words()}")
        elif begun is not None and until - began > run.options.hang_s:
            verdicts[begun] = ("failed", f"did not end in {until - began:.0f} s")
        elif not num_lines and time.monotonic() < until:
            # It did not come to its first case, and so it would be again.
            words = f"its process ended with status {process.status}. {process.words()}"
            verdicts.update(dict.fromkeys(cases[next_case:stop], ("failed", words)))
            break
    for name in cases[start:stop]:
        verdicts.setdefault(name, ("not run", ""))


def _sorted_verdicts(verdicts: dict[str, tuple[str, str]]) -> dict[str, Any]:
    def those(kind: str) -> dict[str, str]:
        return {name: words for name, (verdict, words) in list(verdicts.items()) if verdict == kind}

    return {
        "passed": len(those("passed")),
        "failed": those("failed"),
        "not offered": those("not offered"),
        "not run": list(those("not run")),
    }


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


def _benchmark(run: Run, described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    left = run.time_for("benchmark")
    # It begins no case in the last twentieth, and has that to end the one it is at.
    command = [
        sys.executable,
        "-u",
        "-m",
        "benchmarks.gpu",
        "--json",
        str(run.json_path),
        "--budget-s",
        str(left * 0.9),
    ]
    command += ["--backend", run.options.backend]
    command += ["--dry-run"] if run.options.dry_run else []
    for text in run.options.only or ():
        command += ["--only", text]
    try:
        code = subprocess.run(command, cwd=ROOT, env=run.environment, timeout=left).returncode
    except subprocess.TimeoutExpired:
        return "failed", {"words": "ran out of time; what was measured is kept"}
    return ("passed" if code == 0 else "failed"), {"words": "" if code == 0 else f"exit status {code}"}


_STEPS: dict[str, Callable[[Run, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "environment": _environment,
    "import": _import,
    "conformance": _conformance,
    "tests": _tests,
    "benchmark": _benchmark,
}


def _print_summary(run: Run) -> None:
    """A line a case: what to quote, with the target beside it."""
    figures = run.document.get("figures", [])
    if figures:
        print(f"\n{'case':<58}{'ms':>10}{'rate':>17}{'of ceiling':>11}  target")
    for figure in figures:
        if figure["who"] != "pagedkv" and figure["case"] != "ceilings":
            continue
        name = figure["case"] if figure["who"] == "pagedkv" else figure["who"]
        line = f"{name:<58}{figure['median_ms']:>10.4f}"
        line += f"{figure['rate']:>9.1f} {figure['unit']:<7}" if "rate" in figure else " " * 17
        line += f"{figure['share']:>11.1%}" if "share" in figure else " " * 11
        if "target" in figure:
            line += f"  {figure['target']}: {figure['reached']:.2f}{'' if figure['is_reached'] else ' MISSED'}"
        print(line.rstrip())
    for name, words in run.document.get("failed", {}).items():
        print(f"{name:<58}  FAILED {words[:200]}")
    print()
    for name, step in run.document["steps"].items():
        print(f"{name:<14}{step['verdict']:<9}{step['seconds']:>7} s  {step.get('words', '')[:200]}".rstrip())


def _finished(command: list[str], timeout_s: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Status 124 after the timeout, with what was said until then."""
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        said = [part.decode() if isinstance(part, bytes) else part or "" for part in (error.stdout, error.stderr)]
        return subprocess.CompletedProcess(command, 124, said[0], f"{said[1]}\nran out of time")


class _Process:
    """One that prints lines of JSON, and is killed after a time."""

    def __init__(self, command: list[str], environment: dict[str, str], timeout_s: float) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._words: list[str] = []
        self._reader = threading.Thread(target=lambda stream: self._words.extend(stream), args=(self._process.stderr,))
        self._reader.start()
        self._clock = threading.Timer(timeout_s, self._process.kill)
        self._clock.start()
        self.status = 0

    def lines(self) -> Iterator[dict[str, Any]]:
        """Those lines; sets the status when the process has ended."""
        with self._process as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            self._reader.join()
        self.status = process.returncode
        self._clock.cancel()

    def words(self) -> str:
        """Its last ones."""
        return "".join(self._words)[-500:].strip()


def _last(done: subprocess.CompletedProcess[str], count: int = 600) -> str:
    return f"{done.stdout}\n{done.stderr}".strip()[-count:]


if __name__ == "__main__":
    sys.exit(main())
