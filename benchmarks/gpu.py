"""Measures the Triton back end on one GPU: `python -m benchmarks.gpu --help`. A dry run of it needs none."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from . import gpu_path, machine  # noqa: F401 (the first finds pagedkv for all others)
from .case import OURS, WrongResultError
from .gpu_cases import GpuCase, GpuSpec, Host, Target, all_specs
from .gpu_ceilings import GpuCeilings
from .gpu_clock import Clock, CudaClock, HostClock, Times
from .gpu_guard import run_guarded, update_json
from .gpu_tune import tune_specs

__all__ = ["describe_gpu", "main", "run_spec"]

_SECONDS_EACH = 2.5
# A new process takes over after a case that leaves the device broken.
_BROKEN = 3


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases asked for, and writes after each; 1 when one failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    specs = _chosen(list(tune_specs() if options.tune else all_specs()), options.only, options.after)
    if options.list:
        print("\n".join(spec.name for spec in specs))
        return 0
    if options.inside:
        return _run_specs(specs, options)
    path = options.json or _json_path(options.tune)
    update_json(path, {"machine": {}, "figures": [], "failed": {}, "at": ""})
    # TRITON_INTERPRET is read at the import.
    environment = {"TRITON_INTERPRET": "1"} if options.dry_run else {}
    limits = {"budget_s": options.budget_s, "silence_s": options.silence_s}
    status = run_guarded(arguments, path, environment, **limits)
    print(f"results: {path}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose name contains TEXT; repeatable")
    parser.add_argument("--json", type=Path, metavar="PATH", help="put all figures there (default: in $OUT, or build/)")
    parser.add_argument("--budget-s", type=float, default=520.0, help="begin no case after so many seconds (520)")
    parser.add_argument("--silence-s", type=float, default=150.0, help="a case that takes longer is given up (150)")
    parser.add_argument("--dry-run", action="store_true", help="everything once, tiny, interpreted, on the CPU")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--tune", action="store_true", help="instead: other tiles and numbers of programs than ours")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--after", default="", metavar="NAME", help="go on after this case")
    parser.add_argument("--inside", action="store_true", help="in this process, which a case may end")
    return parser


def _json_path(is_tuning: bool) -> Path:
    folder = Path(os.environ.get("OUT") or Path(__file__).resolve().parent.parent / "build")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp())
    return folder / f"gpu-{'tune' if is_tuning else 'benchmark'}-{time.strftime('%Y-%m-%d-%H%M%S')}.json"


def _run_specs(specs: list[GpuSpec], options: argparse.Namespace) -> int:
    started = time.monotonic()
    if specs and time.monotonic() - started <= options.budget_s:
        clock: Clock = HostClock() if options.dry_run else CudaClock()
        ceilings = GpuCeilings(clock.device, tiny=options.dry_run)
        update_json(options.json, {"machine": describe_gpu(clock.device)})
    left_out = []
    for spec in specs:
        if time.monotonic() - started > options.budget_s:
            left_out.append(spec.name)
            continue
        update_json(options.json, {"at": spec.name})
        result = run_spec(spec, clock, ceilings, options.backend, tiny=options.dry_run)
        _print_result(spec.name, result)
        _keep(options.json, spec.name, result)
        if "error" in result and _is_broken(clock):
            print("  the device does not answer any more: the rest in a new process", flush=True)
            return _BROKEN
    if left_out:
        print(f"left out for lack of time: {', '.join(left_out)}")
        update_json(options.json, {"left_out": left_out})
    return 1 if json.loads(options.json.read_text()).get("failed") else 0


def _chosen(specs: list[GpuSpec], only: list[str] | None, after: str) -> list[GpuSpec]:
    names = [spec.name for spec in specs]
    specs = specs[names.index(after) + 1 :] if after else specs
    return [spec for spec in specs if not only or any(text in spec.name for text in only)]


def run_spec(spec: GpuSpec, clock: Clock, ceilings: GpuCeilings, backend: str, *, tiny: bool) -> dict[str, Any]:
    """The figures of a case, or the error it ended with.

    What is wrong is timed, too, which may help to find why, but each figure says so, and it is an error.
    """
    torch.manual_seed(0)
    try:
        with torch.inference_mode():
            case = spec.build(clock, tiny, backend)
            return _timed(spec.name, case, clock, ceilings)
    except Exception as error:  # noqa: BLE001 - the other cases are still to be measured
        words = f"{type(error).__name__}: {error}"
        # A compiler's error begins with where it is and ends with what it is.
        return {"error": words if len(words) <= 800 else f"{words[:400]} ... {words[-400:]}"}
    finally:
        case = None
        gc.collect()
        if clock.device.type == "cuda":
            with contextlib.suppress(Exception):  # of a device that does not answer any more
                torch.cuda.empty_cache()


def _timed(name: str, case: GpuCase | Host, clock: Clock, ceilings: GpuCeilings) -> dict[str, Any]:
    if isinstance(case, Host):
        times = {who: clock.host_ms(run, rounds=15) for who, run in case.contenders.items()}
        return {"figures": [{"case": name, "who": who, **vars(each)} for who, each in times.items()], "notes": []}
    wrong = ""
    try:
        case.check()
    except WrongResultError as error:
        wrong = f"wrong: {error}"
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
        if who == OURS and wrong:
            figure |= {"wrong": wrong, "is_reached": False}
        figures.append(figure)
    notes = [note if isinstance(note, str) else note() for note in case.notes]
    return {"figures": figures, "notes": notes, **({"error": wrong} if wrong else {})}


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
        print(f"  FAILED: {result['error']}")
    for figure in result.get("figures", []):
        line = f"  {figure['who']:<42}{figure['median_ms']:>10.4f} ms"
        line += f"{figure['p10_ms']:>10.4f} - {figure['p90_ms']:.4f}"
        if "rate" in figure:
            line += f"{figure['rate']:>9.1f} {figure['unit']}"
        if "share" in figure:
            line += f"{figure['share']:>7.1%} of the ceiling"
        if "target" in figure:
            line += f"  target {figure['target']}: {'reached' if figure['is_reached'] else 'MISSED'}"
            line += f" ({figure['reached']:.2f})"
        if figure["late_rounds"]:
            line += f"  in {figure['late_rounds']} of {figure['rounds']} rounds the device may have waited for the host"
        print(line)
    for note in result.get("notes", []):
        print(f"  {note}")
    sys.stdout.flush()


def _keep(path: Path, name: str, result: dict[str, Any]) -> None:
    document = json.loads(path.read_text())
    if "error" in result:
        document.setdefault("failed", {})[name] = result["error"]
    document.setdefault("figures", []).extend(result.get("figures", []))
    if result.get("notes"):
        document.setdefault("notes", {})[name] = result["notes"]
    update_json(path, document)


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


if __name__ == "__main__":
    sys.exit(main())
