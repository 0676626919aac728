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
from benchmarks import gpu, gpu_cases, gpu_ceilings, gpu_guard
from benchmarks.case import WrongResultError
from benchmarks.gpu_batch import GpuShape, LatentBatch
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


@pytest.mark.parametrize(
    "version, dry_run, is_right",
    [
        ("3.5.1", True, False),
        ("3.6.0", True, True),
        ("3.10.0+git1", True, True),
        ("3.5.1", False, True),
        ("3.3.1", False, False),
    ],
)
def test_an_old_triton_is_named(gpu_check, version, dry_run, is_right):
    run = SimpleNamespace(options=SimpleNamespace(dry_run=dry_run))
    there = dict.fromkeys(("gpu", "C compiler", "Python.h"), "there")
    verdict, details = gpu_check._environment(run, {"torch": "2.6.0", "numpy": "2.0.0", "triton": version, **there})
    assert (verdict == "passed") is is_right
    assert ("too old" in details["words"]) is not is_right


def test_what_cannot_be_written_goes_elsewhere(gpu_check, tmp_path):
    (tmp_path / "a_file").write_text("")
    assert gpu_check._writable(tmp_path / "new") == tmp_path / "new"
    elsewhere = gpu_check._writable(tmp_path / "a_file" / "results")
    assert elsewhere.is_dir()
    elsewhere.rmdir()
    options = gpu_check._options(["--json", str(tmp_path / "a_file" / "mine.json")])
    path = gpu_check._json_path(options, {})
    assert path.name == "mine.json"
    path.parent.rmdir()


def test_results_are_named_by_gpu_and_date_and_overwrite_none(gpu_check, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    options = gpu_check._options([])
    first = gpu_check._json_path(options, {"gpu": "NVIDIA H200"})
    assert re.fullmatch(r"nvidia-h200-\d{4}-\d\d-\d\d\.json", first.name)
    first.write_text("{}")
    assert gpu_check._json_path(options, {"gpu": "NVIDIA H200"}).name == f"{first.stem}-2.json"
    tuned = gpu_check._json_path(gpu_check._options(["--steps", "tune"]), {"gpu": "NVIDIA H200"})
    assert tuned.name == f"{first.stem}-tune.json"
    monkeypatch.delenv("OUT")
    assert gpu_check._json_path(options, {"gpu": "x"}).parent == ROOT / "benchmarks" / "results"


@pytest.fixture
def run_shard(gpu_check, tmp_path):
    """Runs cases 0 to 3 by a program that stands for the process of the cases; gives the verdicts."""

    def verdicts_of(program, seconds=60.0):
        script = tmp_path / "cases.py"
        script.write_text(
            f"import json, os, sys, time\nop, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n{program}"
        )
        cases = importlib.import_module("gpu_check_cases")
        verdicts = {}
        shard = cases.Shard("op", tuple("abcd"), 0, 4)
        limits = {"until": time.monotonic() + seconds, "hang_s": 2.0}
        cases.run_shard(verdicts, shard, [sys.executable, str(script)], dict(os.environ), **limits)
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


def test_what_the_compiler_says_of_a_failed_case_is_kept(run_shard):
    program = """
for number in range(start, stop):
    if number == 1:
        print("x.py:1: note: nothing", "x.py:2:3: error: no such layout", file=sys.stderr, sep="\\n", flush=True)
        time.sleep(0.2)
    verdict = "failed" if number in (1, 2) else "passed"
    print(json.dumps({"case": "abcd"[number], "number": number, "verdict": verdict, "words": "it"}), flush=True)
    time.sleep(0.2)
"""
    verdicts = run_shard(program)
    assert verdicts["b"] == ("failed", "it x.py:2:3: error: no such layout")
    assert verdicts["c"] == ("failed", "it")


def test_a_case_that_hangs_is_given_up_and_the_others_run(run_shard):
    verdicts = run_shard(ONE_BY_ONE % "time.sleep(60 * (number == 1))")
    assert [verdicts[name][0] for name in "abcd"] == ["passed", "failed", "passed", "passed"]
    assert "did not end in " in verdicts["b"][1]


def test_cases_after_the_time_is_up_are_not_run(run_shard):
    verdicts = run_shard(ONE_BY_ONE % "time.sleep(1.0 * (number == 2))", seconds=1.0)
    assert [verdicts[name][0] for name in "abcd"] == ["passed", "passed", "not run", "not run"]


def test_a_process_that_cannot_start_fails_all_its_cases_once(run_shard):
    verdicts = run_shard("raise RuntimeError('no torch here')")
    assert [verdict for verdict, _ in verdicts.values()] == ["failed"] * 4
    assert "no torch here" in verdicts["a"][1]


class Event:
    """Of a played device whose clock counts calls; it begins at once what comes after less than `needs_ms` of sleep."""

    now = 0.0
    slept = 0.0
    needs_ms = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 0.5
        self.at = Event.now

    def query(self):
        return Event.slept < Event.needs_ms

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


def sleep(cycles):
    """A billion a second."""
    Event.slept = cycles / 1e6
    Event.now += Event.slept


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
        "_sleep": sleep,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Event, "needs_ms", 0.0)
    return CudaClock("cpu", flush_bytes=1024)


def takes(milliseconds):
    return lambda i: setattr(Event, "now", Event.now + milliseconds)


def test_the_clock_of_a_device_times_the_run_alone(played_device):
    times = played_device.time({"short": takes(1.0), "long": takes(3.0)}, budget_s=0.05)
    assert times["short"].median_ms == pytest.approx(1.5)
    assert times["long"].median_ms == pytest.approx(3.5)
    assert times["short"].rounds == times["long"].rounds >= 7
    assert times["short"].late_rounds == 0
    assert played_device.captured(lambda: None)() is None
    assert played_device.host_ms(lambda: None, rounds=3).rounds == 3


def test_rounds_that_may_have_waited_for_the_host_do_not_count(played_device):
    """Until the sleep has been doubled to more than 5 ms; then it stays so."""
    Event.needs_ms = 5.0
    times = played_device.time({"run": takes(1.0)}, budget_s=1.0)["run"]
    assert times.late_rounds == 0
    assert 7 <= times.rounds < 100


def test_a_call_that_always_waits_for_the_device_says_so(played_device):
    Event.needs_ms = 1e9
    times = played_device.time({"run": takes(1.0)}, budget_s=1.0)["run"]
    assert times.late_rounds == times.rounds >= 7


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


def test_of_several_ways_to_read_the_fastest_is_the_ceiling(played_device):
    runs = [takes(3.0), takes(1.0), takes(2.0)]
    assert min(runs, key=gpu_ceilings._milliseconds) is runs[1]
    assert gpu_ceilings._milliseconds(takes(2.0)) == pytest.approx(20 * 2.0 + 0.5)


def test_the_read_probe_reads_everything():
    probe = GpuCeilings(torch.device("cpu"), tiny=True).probe("read")
    assert (probe.work, probe.unit) == (1 << 16, "GB/s")
    probe.run(0)


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


def test_what_is_wrong_says_so_and_what_raises_does_not_end_the_run():
    def check():
        raise WrongResultError("off by one")

    target = Target("copy", 1.0, ">= 1x")
    wrong = timed(GpuCase({"pagedkv": lambda i: None, "copy": lambda i: None}, check, target=target), FixedClock())
    assert wrong["error"] == "wrong: off by one"
    ours, copy = wrong["figures"]
    assert (ours["wrong"], ours["is_reached"], ours["reached"]) == ("wrong: off by one", False, 1.0)
    assert "wrong" not in copy

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
        status = gpu.main(["--dry-run", "--inside", "--backend", "reference", "--json", str(path)])
    document = json.loads(path.read_text())
    assert "failed" not in document
    assert status == 0
    assert {figure["case"] for figure in document["figures"]} == {spec.name for spec in all_specs()}


def test_other_tiles_and_programs_are_timed_beside_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "HostClock", FixedClock)
    monkeypatch.setattr(GpuCeilings, "_read", GpuCeilings._copy)
    path = tmp_path / "tune.json"
    tile, latent_tile, programs = "keys 32, warps 4, stages 3", "rows 64, keys 64, warps 8, stages 2", "2 programs"
    only = [f"S64-ctx4096-32/8/128-bf16-P16/{tile}", latent_tile, f"S256-ctx1024-64/8/128-bf16-P16/{programs}"]
    arguments = [word for name in only for word in ("--only", name)]
    assert gpu.main(["--dry-run", "--inside", "--tune", "--json", str(path), *arguments]) == 0
    document = json.loads(path.read_text())
    assert len({figure["case"] for figure in document["figures"]}) == 3
    assert {"pagedkv", tile, latent_tile, programs} < {figure["who"] for figure in document["figures"]}
    assert "notes" not in document


def test_a_run_by_hand_needs_no_installation(tmp_path):
    """And a dry one is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--only", "merge"]
    done = subprocess.run(
        command, env={**environment, "OUT": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    assert f"results: {path}" in done.stdout
    assert json.loads(path.read_text())["figures"]


def test_cases_after_the_time_is_up_are_named_not_run(tmp_path, capsys):
    path = tmp_path / "none.json"
    assert gpu.main(["--dry-run", "--inside", "--backend", "reference", "--json", str(path), "--budget-s", "-1"]) == 0
    assert len(json.loads(path.read_text())["left_out"]) == len(list(all_specs()))
    assert "left out for lack of time: ceilings, decode" in capsys.readouterr().out


def test_a_broken_device_is_left_to_a_new_process(monkeypatch, tmp_path):
    class Broken(FixedClock):
        def wait(self):
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "HostClock", Broken)
    path = tmp_path / "broken.json"
    arguments = ["--dry-run", "--inside", "--backend", "reference", "--only", "copy_pages", "--json", str(path)]
    assert gpu.main(arguments) == 3
    assert "illegal memory access" in json.loads(path.read_text())["failed"]["copy_pages/8192-of-64KiB"]
    # What the new process then does: nothing is left, and the failure is still one.
    monkeypatch.setattr(gpu, "HostClock", FixedClock)
    assert gpu.main([*arguments, "--after", "store_kv/T64-8x128-bf16"]) == 1


PLAYED_BENCHMARK = """
import json, os, sys, time
from pathlib import Path
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))  # after --inside
path, cases = Path(options["--json"]), "abcd"
begin_at = cases.index(options["--after"]) + 1 if options["--after"] else 0
for case in cases[begin_at:]:
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**document, "at": case, "begun": document.get("begun", "") + case}))
    %s
sys.exit(0)
"""


@pytest.fixture
def guarded(monkeypatch, tmp_path):
    """Runs cases a to d of a played benchmark; gives the status and what it left."""

    def result_of(program, **limits):
        folder = tmp_path / "benchmarks"
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "gpu.py").write_text(PLAYED_BENCHMARK % program)
        monkeypatch.setattr(gpu_guard, "_ROOT", tmp_path)
        path = tmp_path / "x.json"
        status = gpu_guard.run_guarded([], path, {}, **{"budget_s": 60.0, "silence_s": 60.0, **limits})
        return status, json.loads(path.read_text()) if path.exists() else {}

    return result_of


def test_a_benchmark_that_ends_well_is_run_once(guarded):
    status, document = guarded("pass")
    assert (status, document["begun"]) == (0, "abcd")
    assert "failed" not in document


def test_cases_after_one_that_kills_its_process_are_run(guarded):
    status, document = guarded("os.abort() if case in 'bd' else None")
    assert (status, document["begun"]) == (1, "abcd")
    assert document["failed"] == dict.fromkeys("bd", "its process ended with status -6")


def test_cases_after_one_that_hangs_are_run(guarded):
    status, document = guarded("time.sleep(60 * (case == 'b'))", silence_s=2.0)
    assert (status, document["begun"]) == (1, "abcd")
    assert document["failed"] == {"b": "did not end in 2 s"}


def test_a_benchmark_that_does_not_start_is_not_tried_again(guarded, monkeypatch):
    monkeypatch.setattr(gpu_guard.sys, "executable", "/bin/sh")  # which knows no -u -m
    status, document = guarded("pass")
    assert status == 1
    assert document["failed"] == {"all after ''": "its process ended with status 2"}


def test_bytes_and_operations_are_those_counted_by_hand():
    """Those of the targets, in full: 2 is the size of bfloat16, or multiply and add."""
    decode, one, many = gpu_cases._DECODES
    keys_and_values = 2 * 8 * 128 * 2
    assert decode.num_bytes == 64 * 4096 * keys_and_values == 1 << 30
    assert one.num_bytes == 131072 * keys_and_values
    assert (many.num_q_heads, many.num_bytes) == (64, 256 * 1024 * keys_and_values)
    # A float32 scale a head: 132 bytes for 256.
    fp8 = GpuShape(64, 4096, dtype=torch.float8_e4m3fn)
    assert fp8.num_bytes * 256 == decode.num_bytes * 132
    assert GpuShape(64, 4096, dtype=torch.float8_e4m3fn, has_scales=False).num_bytes * 2 == decode.num_bytes
    pairs = sum(range(1, 16385))  # of a row and a key it sees
    assert gpu_cases._PREFILL.num_flops == pairs * 32 * (2 * 128 + 2 * 128)
    assert GpuShape(2, 10, 4, 2, 8, q_len=3).num_flops == 2 * (8 + 9 + 10) * 4 * (2 * 8 + 2 * 8)


def test_operations_of_latent_attention_are_those_counted_by_hand():
    batch = LatentBatch(2, 37, 4, torch.device("cpu"), "reference", widths=(32, 16), page_size=16)
    # A product with 32 + 16 columns, a sum of 32.
    assert batch.num_flops == 2 * 37 * 4 * (2 * (32 + 16) + 2 * 32)


@pytest.mark.parametrize(
    "name, num_bytes",
    [
        # 48 tokens of 8 x 32, keys and values, read and written; 2 bytes, or 2 to 1 and a scale of 4 bytes a head.
        ("store_kv/T131072-8x128-bf16", 2 * 48 * 8 * 32 * (2 + 2)),
        ("gather_kv/T131072-8x128-bf16", 2 * 48 * 8 * 32 * (2 + 2)),
        ("store_kv_quantized/T131072-8x128-bf16-to-int8", 2 * 48 * 8 * (32 * (2 + 1) + 4)),
        # 6 pages of keys and values, 16 tokens each.
        ("copy_pages/8192-of-64KiB", 6 * 2 * 16 * 8 * 32 * (2 + 2)),
    ],
)
def test_bytes_moved_are_those_counted_by_hand(name, num_bytes):
    (spec,) = (spec for spec in all_specs() if spec.name == name)
    case = spec.build(HostClock(), True, "reference")
    assert (case.ceiling, case.work) == ("copy", num_bytes)


def test_flashinfer_is_last_and_may_fail(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_cases, "has_flashinfer", lambda: True)
    monkeypatch.setattr(gpu, "HostClock", FixedClock)
    monkeypatch.setattr(GpuCeilings, "_read", GpuCeilings._copy)
    names = [spec.name.split("/")[0] for spec in all_specs()]
    assert names[-6:] == ["beside_flashinfer"] * 6
    assert "beside_flashinfer" not in names[:-6]
    path = tmp_path / "fi.json"
    arguments = ["--dry-run", "--inside", "--backend", "reference", "--only", "beside_flashinfer/S1-q", "--json"]
    assert gpu.main([*arguments, str(path)]) == 0
    document = json.loads(path.read_text())
    assert "pagedkv" in {figure["who"] for figure in document["figures"]}
    ((note,),) = document["notes"].values()
    assert note.startswith("FlashInfer did not run: ModuleNotFoundError")
