"""The check for a machine with a GPU works, tried on one without: interpreted, tiny, with a device that is played."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu_cases import GpuCase, GpuSpec, Host, Target, all_specs
from benchmarks.gpu_ceilings import GpuCeilings
from benchmarks.gpu_clock import CudaClock, HostClock, Times

ROOT = Path(__file__).resolve().parents[3]


STEPS_BUT_TESTS = ["environment", "import", "conformance", "benchmark"]


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    return importlib.import_module("gpu_check")


def test_a_dry_run_reports_every_step(gpu_check, tmp_path, capfd):
    path = tmp_path / "results" / "dry.json"
    options = ["--ops", "gather_kv", "--most-cases", "1", "--only", "ceilings", "copy_pages", "--json", str(path)]
    status = gpu_check.main(["--dry-run", "--backend", "reference", *options, "--steps", *STEPS_BUT_TESTS])
    out = capfd.readouterr().out
    assert status == 0, out
    document = json.loads(path.read_text())
    assert {name: step["verdict"] for name, step in document["steps"].items()} == dict.fromkeys(
        STEPS_BUT_TESTS, "passed"
    )
    assert document["steps"]["conformance"]["passed"] == 1
    assert {figure["case"] for figure in document["figures"]} == {"ceilings", "copy_pages/8192-of-64KiB"}
    assert document["machine"]["commit"]
    assert "copy_pages/8192-of-64KiB" in out.split("of ceiling")[-1]


def test_a_failed_step_neither_hides_nor_stops_the_others(gpu_check, monkeypatch, tmp_path, capfd):
    """A back end that does not exist, and a benchmark that does not start."""
    monkeypatch.setattr(gpu_check.sys, "executable", "/bin/false")
    path = tmp_path / "dry.json"
    options = ["--ops", "gather_kv", "--most-cases", "2", "--json", str(path)]
    assert gpu_check.main(["--dry-run", "--backend", "nobody", *options, "--steps", *STEPS_BUT_TESTS]) == 1
    steps = json.loads(path.read_text())["steps"]
    assert [step["verdict"] for step in steps.values()] == ["passed", "failed", "failed", "failed"]
    assert len(steps["conformance"]["failed"]) == 2
    assert "FAILED: import, conformance, benchmark" in capfd.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(tmp_path):
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--steps", "environment", "--json", str(tmp_path / "none.json")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 1
    assert "missing: gpu" in done.stdout


def test_results_are_named_by_gpu_and_date_and_overwrite_none(gpu_check, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    options = gpu_check._options([])
    first = gpu_check._json_path(options, {"gpu": "NVIDIA H200"})
    assert re.fullmatch(r"nvidia-h200-\d{4}-\d\d-\d\d\.json", first.name)
    first.write_text("{}")
    assert gpu_check._json_path(options, {"gpu": "NVIDIA H200"}).name == f"{first.stem}-2.json"
    monkeypatch.delenv("OUT")
    assert gpu_check._json_path(options, {"gpu": "x"}).parent == ROOT / "benchmarks" / "results"


@pytest.fixture
def run_shard(gpu_check, monkeypatch, tmp_path):
    """Runs cases 0 to 3 by a program that stands for the process of the cases; gives the verdicts."""

    def verdicts_of(program, seconds=60.0):
        script = tmp_path / "scripts" / "gpu_conformance.py"
        script.parent.mkdir()
        script.write_text(
            f"import json, os, sys, time\nop, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n{program}"
        )
        monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
        run = gpu_check.Run(
            gpu_check._options(["--dry-run", "--hang-s", "0.1"]), dict(os.environ), tmp_path / "x.json", 0.0, {}
        )
        verdicts = {}
        gpu_check._run_shard(run, verdicts, "op", list("abcd"), 0, 4, time.monotonic() + seconds)
        return verdicts

    return verdicts_of


ONE_BY_ONE = """
for number in range(start, stop):
    print(json.dumps({"started": "abcd"[number], "number": number}), flush=True)
    %s
    print(json.dumps({"case": "abcd"[number], "number": number, "verdict": "passed", "words": ""}), flush=True)
"""


def test_a_case_that_kills_its_process_is_followed_by_the_others(run_shard):
    verdicts = run_shard(ONE_BY_ONE % "os.abort() if number == 1 else None")
    assert verdicts["b"][0] == "failed"
    assert "ended with status -6" in verdicts["b"][1]
    assert [verdicts[name][0] for name in "acd"] == ["passed"] * 3


def test_a_case_that_hangs_is_named_and_the_rest_is_not_run(run_shard):
    verdicts = run_shard(ONE_BY_ONE % "time.sleep(60 * (number == 2))", seconds=1.5)
    assert [verdicts[name][0] for name in "abcd"] == ["passed", "passed", "failed", "not run"]
    assert "did not end in " in verdicts["c"][1]


def test_a_process_that_cannot_start_fails_all_its_cases_once(run_shard):
    verdicts = run_shard("raise RuntimeError('no torch here')")
    assert [verdict for verdict, _ in verdicts.values()] == ["failed"] * 4
    assert "no torch here" in verdicts["a"][1]


class Event:
    """Of a played device whose clock counts calls."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 0.5
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def played_device(monkeypatch):
    """torch.cuda as far as the clock uses it, on the CPU; kernels take a millisecond each."""

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            Event.now += 1.0

    class Nothing:
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": Nothing,
        "stream": Nothing,
        "current_stream": Stream,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: setattr(Event, "now", Event.now + cycles / 1e6),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return CudaClock("cpu", flush_bytes=1024)


def test_the_clock_of_a_device_times_the_run_alone(played_device):
    def takes(milliseconds):
        return lambda i: setattr(Event, "now", Event.now + milliseconds)

    times = played_device.time({"short": takes(1.0), "long": takes(3.0)}, budget_s=0.05)
    assert times["short"].median_ms == pytest.approx(1.5)
    assert times["long"].median_ms == pytest.approx(3.5)
    assert times["short"].rounds == times["long"].rounds >= 7
    assert played_device.captured(lambda: None)() is None
    assert played_device.host_ms(lambda: None, rounds=3).rounds == 3


@pytest.mark.parametrize("microseconds, milliseconds", [([], None), ([1500.0, 500.0], 2.0)])
def test_kernels_are_summed_if_the_profiler_sees_any(played_device, monkeypatch, microseconds, milliseconds):
    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def key_averages(self):
            return [SimpleNamespace(self_device_time_total=each) for each in microseconds]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert played_device.kernels_ms(lambda: None) == milliseconds


def test_median_and_spread():
    times = Times.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    assert (times.median_ms, times.p10_ms, times.p90_ms, times.rounds) == (6.0, 2.0, 10.0, 11)


class FixedClock(HostClock):
    """Says that everything takes as long as the test wants."""

    def __init__(self, **milliseconds):
        self._milliseconds = milliseconds

    def time(self, runs, budget_s):
        return {name: Times.of([self._milliseconds.get(name, 2.0)]) for name in runs}


def timed(case, clock, name="case"):
    spec = GpuSpec(name, lambda clock, tiny, backend: case)
    return gpu.run_spec(spec, clock, GpuCeilings(torch.device("cpu"), tiny=True), "reference", tiny=True)


def test_a_figure_is_a_share_of_the_ceiling_of_its_rounds():
    contenders = {"pagedkv": lambda i: None, "peer": lambda i: None}
    case = GpuCase(contenders, lambda: None, "copy", work=1 << 16, target=Target("share", 0.85, ">= 85 % of copy"))
    result = timed(case, FixedClock(pagedkv=1.0, peer=4.0))
    ceiling, ours, peer = result["figures"]
    assert ceiling["rate"] == pytest.approx(2 * (1 << 16) / 2.0 / 1e6)
    assert (ours["share"], peer["share"]) == (pytest.approx(1.0), pytest.approx(0.25))
    assert (ours["reached"], ours["is_reached"]) == (pytest.approx(1.0), True)
    assert "is_reached" not in peer


@pytest.mark.parametrize("ms, is_reached", [(1.0, True), (1.2, False)])
def test_a_target_may_be_a_multiple_of_a_contender(ms, is_reached):
    case = GpuCase(
        {"pagedkv": lambda i: None, "bf16": lambda i: None},
        lambda: None,
        "read",
        work=1 << 16,
        target=Target("bf16", 1.7, ">= 1.7x"),
    )
    ours, bf16 = timed(case, FixedClock(pagedkv=ms, bf16=1.8))["figures"][1:]
    assert ours["reached"] == pytest.approx(1.8 / ms)
    assert ours["is_reached"] is is_reached
    assert "rate" not in bf16


def test_what_is_wrong_is_not_timed_and_what_raises_does_not_end_the_run():
    def check():
        raise gpu.WrongResultError("off by one")

    wrong = timed(GpuCase({"pagedkv": lambda i: None}, check), FixedClock())
    assert wrong == {"error": "wrong: off by one"}

    def build(clock, tiny, backend):
        raise ZeroDivisionError("planted")

    ceilings = GpuCeilings(torch.device("cpu"), tiny=True)
    raised = gpu.run_spec(GpuSpec("x", build), HostClock(), ceilings, "reference", tiny=True)
    assert raised == {"error": "ZeroDivisionError: planted"}


def test_host_times_have_no_rate():
    result = timed(Host({"pagedkv": lambda: None}), HostClock())
    assert result["figures"][0]["who"] == "pagedkv"
    assert "rate" not in result["figures"][0]


def test_names_are_unique_and_the_targets_come_first():
    names = [spec.name for spec in all_specs()]
    assert len(set(names)) == len(names)
    assert names[0] == "ceilings"
    assert [name.split("/")[0] for name in names[1:4]] == ["decode"] * 3


def test_every_case_runs_in_small(monkeypatch, tmp_path):
    """By the reference, which is quick; what the kernels do is not what is tested here."""
    monkeypatch.setattr(gpu, "HostClock", FixedClock)
    monkeypatch.setattr(GpuCeilings, "_read", GpuCeilings._copy)
    path = tmp_path / "all.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PAGEDKV_COMMIT", raising=False)
        status = gpu.main(["--dry-run", "--backend", "reference", "--json", str(path)])
    document = json.loads(path.read_text())
    assert not document["failed"]
    assert status == 0
    assert {figure["case"] for figure in document["figures"]} == {spec.name for spec in all_specs()}


def test_other_tiles_and_programs_are_timed_beside_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "HostClock", FixedClock)
    monkeypatch.setattr(GpuCeilings, "_read", GpuCeilings._copy)
    path = tmp_path / "tune.json"
    arguments = ["--dry-run", "--tune", "--only", "S256", "--only", "mla", "--json", str(path)]
    assert gpu.main(arguments) == 0
    document = json.loads(path.read_text())
    who = {figure["who"] for figure in document["figures"]}
    assert {"pagedkv", "keys 32, warps 4, stages 3", "rows 64, keys 64, warps 8, stages 2"} < who
    assert "2 programs a multiprocessor" in who
    assert "notes" not in document


def test_a_dry_run_by_hand_is_interpreted():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--only", "merge"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pagedkv" in done.stdout


def test_cases_after_the_time_is_up_are_named_not_run(tmp_path, capsys):
    path = tmp_path / "none.json"
    assert gpu.main(["--dry-run", "--backend", "reference", "--json", str(path), "--budget-s", "-1"]) == 0
    assert len(json.loads(path.read_text())["left_out"]) == len(list(all_specs()))
    assert "left out for lack of time: ceilings, decode" in capsys.readouterr().out


def test_a_broken_device_is_left_to_a_new_process(monkeypatch, tmp_path):
    class Broken(FixedClock):
        def wait(self):
            raise RuntimeError("an illegal memory access was encountered")

    def execv(path, command):
        raise SystemExit(" ".join(command[1:]))

    monkeypatch.setattr(gpu, "HostClock", Broken)
    monkeypatch.setattr(gpu.os, "execv", execv)
    path = str(tmp_path / "broken.json")
    arguments = ["--dry-run", "--backend", "reference", "--only", "copy_pages", "--json", path, "--budget-s", "100"]
    with pytest.raises(SystemExit, match=r"-m benchmarks.gpu .* --after copy_pages/8192-of-64KiB --budget-s \d+"):
        gpu.main(arguments)
    assert "illegal memory access" in json.loads(Path(path).read_text())["failed"]["copy_pages/8192-of-64KiB"]
    # What the new process then does: nothing is left, and the failure is still one.
    monkeypatch.setattr(gpu, "HostClock", FixedClock)
    assert gpu.main([*arguments, "--after", "store_kv/T64-8x128-bf16"]) == 1
