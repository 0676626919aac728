"""Measures the Triton back end on one GPU: `python -m benchmarks.gpu --help`. A dry run of it needs none."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import machine
from .case import OURS, WrongResultError
from .gpu_cases import GpuCase, GpuSpec, Host, Target, all_specs
from .gpu_ceilings import GpuCeilings
from .gpu_clock import Clock, CudaClock, HostClock, Times
from .gpu_tune import tune_specs

__all__ = ["describe_gpu", "main", "run_spec", "update_json"]

_SECONDS_EACH = 2.5


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases asked for, and writes after each; 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose name contains TEXT; repeatable")
    parser.add_argument("--json", type=Path, metavar="PATH", help="put all figures there, beside what is there")
    parser.add_argument("--budget-s", type=float, default=1e9, help="begin no case after so many seconds")
    parser.add_argument("--dry-run", action="store_true", help="everything once, tiny, interpreted, on the CPU")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--tune", action="store_true", help="instead: other tiles and numbers of programs than ours")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--after", default="", metavar="NAME", help="go on after this case")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    specs = _chosen(list(tune_specs() if options.tune else all_specs()), options.only, options.after)
    if options.list:
        print("\n".join(spec.name for spec in specs))
        return 0
    clock: Clock = HostClock() if options.dry_run else CudaClock()
    ceilings = GpuCeilings(clock.device, tiny=options.dry_run)
    failed, left_out = 0, []
    if options.json and not options.after:
        update_json(options.json, {"machine": describe_gpu(clock.device), "figures": [], "failed": {}})
    for spec in specs:
        if time.monotonic() - started > options.budget_s:
            left_out.append(spec.name)
            continue
        result = run_spec(spec, clock, ceilings, options.backend, tiny=options.dry_run)
        _print_result(spec.name, result)
        if options.json:
            _keep(options.json, spec.name, result)
        failed += "error" in result
        if "error" in result and _is_broken(clock):
            _go_on_in_a_new_process(sys.argv[1:] if arguments is None else arguments, spec.name, started, options)
    if left_out:
        print(f"left out for lack of time: {', '.join(left_out)}")
        if options.json:
            update_json(options.json, {"left_out": left_out})
    total_failed = len(json.loads(options.json.read_text())["failed"]) if options.json else failed
    return 1 if total_failed else 0


def _chosen(specs: list[GpuSpec], only: list[str] | None, after: str) -> list[GpuSpec]:
    names = [spec.name for spec in specs]
    specs = specs[names.index(after) + 1 :] if after else specs
    return [spec for spec in specs if not only or any(text in spec.name for text in only)]


def run_spec(spec: GpuSpec, clock: Clock, ceilings: GpuCeilings, backend: str, *, tiny: bool) -> dict[str, Any]:
    """The figures of a case, or the error it ended with; a wrong op is an error, and is not timed."""
    torch.manual_seed(0)
    try:
        with torch.inference_mode():
            case = spec.build(clock, tiny, backend)
            return _timed(spec.name, case, clock, ceilings)
    except WrongResultError as error:
        return {"error": f"wrong: {error}"}
    except Exception as error:  # noqa: BLE001 - the other cases are still to be measured
        return {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    finally:
        case = None
        gc.collect()
        if clock.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # of a device that does not answer any more
                torch.cuda.empty_cache()


def _timed(name: str, case: GpuCase | Host, clock: Clock, ceilings: GpuCeilings) -> dict[str, Any]:
    if isinstance(case, Host):
        times = {who: clock.host_ms(run, rounds=15) for who, run in case.contenders.items()}
        return {"figures": [{"case": name, "who": who, **vars(each)} for who, each in times.items()], "notes": []}
    case.check()
    clock.wait()
    kinds = ["read", "copy", "matmul"] if name == "ceilings" else [case.ceiling] if case.ceiling else []
    probes = {kind: ceilings.probe(kind) for kind in kinds}  # type: ignore[arg-type]
    runs = {**case.contenders, **{probe.name: probe.run for probe in probes.values()}}
    times = clock.time(runs, _SECONDS_EACH)
    figures = []
    for probe in probes.values():
        rate = _rate(probe.work, times[probe.name], probe.unit)
        figures.append({"case": name, "who": probe.name, **vars(times[probe.name]), "rate": rate, "unit": probe.unit})
    for who in case.contenders:
        figure: dict[str, Any] = {"case": name, "who": who, **vars(times[who])}
        if case.ceiling:
            probe = probes[case.ceiling]
            # A contender on pages of another dtype has other bytes to read: its rate is not this one.
            if who == OURS or case.target is None or who != case.target.kind:
                figure |= {"rate": _rate(case.work, times[who], probe.unit), "unit": probe.unit}
                figure["share"] = figure["rate"] / figures[0]["rate"]
        if who == OURS and case.target:
            figure |= _held_to(case.target, figure, times)
        figures.append(figure)
    return {"figures": figures, "notes": list(case.notes)}


def _rate(work: int, times: Times, unit: str) -> float:
    return work / times.median_ms / (1e9 if unit == "TFLOP/s" else 1e6)


def _held_to(target: Target, figure: dict[str, Any], times: dict[str, Times]) -> dict[str, Any]:
    """The target, what is held to it, and whether it is reached; 3 % are noise where two times are compared."""
    if target.kind == "share":
        reached, least = figure["share"], target.least
    elif target.kind == "tflops":
        reached, least = figure["rate"], target.least
    else:
        reached, least = times[target.kind].median_ms / figure["median_ms"], target.least
        least -= 0.03 * (least == 1.0)
    return {"target": target.words, "reached": reached, "is_reached": reached >= least}


def _print_result(name: str, result: dict[str, Any]) -> None:
    print(name)
    if "error" in result:
        print(f"  FAILED: {result['error']}", flush=True)
        return
    for figure in result["figures"]:
        line = f"  {figure['who']:<42}{figure['median_ms']:>10.4f} ms"
        line += f"{figure['p10_ms']:>10.4f} - {figure['p90_ms']:.4f}"
        if "rate" in figure:
            line += f"{figure['rate']:>9.1f} {figure['unit']}"
        if "share" in figure:
            line += f"{figure['share']:>7.1%} of the ceiling"
        if "target" in figure:
            line += f"  target {figure['target']}: {'reached' if figure['is_reached'] else 'MISSED'}"
            line += f" ({figure['reached']:.2f})"
        print(line)
    for note in result["notes"]:
        print(f"  {note}")
    sys.stdout.flush()


def _keep(path: Path, name: str, result: dict[str, Any]) -> None:
    document = json.loads(path.read_text())
    if "error" in result:
        document["failed"][name] = result["error"]
    else:
        document["figures"] += result["figures"]
        if result["notes"]:
            document.setdefault("notes", {})[name] = result["notes"]
    update_json(path, document)


def update_json(path: Path, values: dict[str, Any]) -> None:
    """Sets keys of the document at once: a run that is killed leaves what it had."""
    document = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({**document, **values}, indent=1) + "\n")
    beside.replace(path)


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """The machine, as for every benchmark, and its GPU; PAGEDKV_COMMIT names the commit where there is no git."""
    described = machine.describe()
    if described["commit"] == "none":
        described["commit"] = os.environ.get("PAGEDKV_COMMIT", "none")
    described["versions"]["triton"] = _version("triton")
    described["versions"]["flashinfer"] = _version("flashinfer-python")
    if device.type != "cuda":
        return {**described, "gpu": "none: a dry run"}
    properties = torch.cuda.get_device_properties(device)
    return {
        **described,
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "capability": getattr(properties, "gcnArchName", "") or f"{properties.major}.{properties.minor}",
        "runtime": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
    }


def _version(name: str) -> str:
    from importlib import metadata

    for each in (name, f"pytorch-{name}", f"pytorch-{name}-rocm"):
        try:
            return metadata.version(each)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def _is_broken(clock: Clock) -> bool:
    """After a kernel that read or wrote outside of memory nothing runs in this process any more."""
    try:
        clock.wait()
    except Exception:  # noqa: BLE001 - any error of the driver
        return True
    return False


def _go_on_in_a_new_process(arguments: Iterable[str], after: str, started: float, options: argparse.Namespace) -> None:
    left = max(options.budget_s - (time.monotonic() - started), 0.0)
    print("  the device does not answer any more: the rest in a new process", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--after", after, "--budget-s", str(left)]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    if "--dry-run" in sys.argv and os.environ.get("TRITON_INTERPRET") != "1":
        # It is read when pagedkv is imported, which is done.
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    sys.exit(main())
