"""The benchmark runner: nothing wrong is timed, and a figure carries all that is needed to read it."""

import json

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import case as cases
from benchmarks import runner
from benchmarks.ops import all_cases, store_kv


def spec_of(check, **options):
    runs = {cases.OURS: lambda i: sum(range(100)), "peer": lambda i: sum(range(1000))}
    return cases.CaseSpec("sum", "n100", lambda: cases.Case(runs, check, "none", num_bytes=800, **options))


def test_a_wrong_op_is_not_timed():
    def check():
        raise cases.WrongResultError("off by one")

    with pytest.raises(cases.WrongResultError, match="off by one"):
        runner.run_case(spec_of(check), quick=True)


def test_a_figure_has_median_and_spread_of_one_call():
    ours, peer = runner.run_case(spec_of(lambda: None, repeats=10), quick=True)
    assert (ours.who, peer.who) == (cases.OURS, "peer")
    assert ours.ratio_to_ours == 1
    for figure in (ours, peer):
        assert 0 < figure.p10_ms <= figure.median_ms <= figure.p90_ms
        assert figure.rate == pytest.approx(800 / figure.median_ms / 1e6)
        assert figure.rounds >= 5


def test_a_case_is_held_against_its_ceiling(monkeypatch):
    monkeypatch.setattr(store_kv, "_NUM_TOKENS", (32,))
    monkeypatch.setattr(cases, "_ROTATED_BYTES", 1 << 19)
    spec = next(store_kv.cases(cases.Options()))
    ours = runner.run_case(spec, quick=True)[0]
    assert ours.ceiling == "copy_ of as many bytes"
    assert ours.fraction_of_ceiling == pytest.approx(ours.rate / ours.ceiling_rate)


def test_a_store_that_loses_rows_is_caught(monkeypatch):
    monkeypatch.setattr(store_kv.pagedkv, "store_kv", lambda *args, **kwargs: None)
    monkeypatch.setattr(cases, "_ROTATED_BYTES", 1)
    spec = cases.CaseSpec("store_kv", "T4", lambda: store_kv._build(store_kv.TokenShape(4, 2, 8, torch.float32), "NHD"))
    with pytest.raises(cases.WrongResultError, match="stored rows differ"):
        runner.run_case(spec, quick=True)


def test_the_command_lists_writes_and_refuses(tmp_path, capsys):
    assert command.main(["--list", "--only", "attention_decode", "--only", "copy_pages"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 18 + 4
    assert "attention_decode/S8-ctx2048-Hq32-Hk8-D128-bf16" in names
    with pytest.raises(SystemExit):
        command.main(["--only", "no such case"])
    assert "no case has a name that contains no such case" in capsys.readouterr().err
    path = tmp_path / "made" / "figures.json"
    assert command.main(["--quick", "--only", "compare_key/n16-", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["machine"].keys() >= {"cpu", "cores", "isa", "threads", "commit", "date", "versions"}
    assert [figure["who"] for figure in written["figures"]] == [cases.OURS, "numpy, all at once"]


def test_case_names_are_unique():
    names = [spec.name for spec in all_cases(cases.Options())]
    assert len(set(names)) == len(names) > 30
