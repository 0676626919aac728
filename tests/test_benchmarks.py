"""The benchmark runner: nothing wrong is timed, and a figure carries all that is needed to read it."""

import json

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import case as cases
from benchmarks import paged_batch, paged_kv, report, runner
from benchmarks.ceilings import Probe
from benchmarks.ops import (
    all_cases,
    attention_decode,
    attention_mla,
    attention_prefill,
    attention_shared_prefix,
    attention_skewed,
    plan_attention,
    store_kv,
    store_kv_quantized,
)
from benchmarks.ragged_decode import Heads

F32, BF16, INT8, E4M3 = torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn


def spec_of(check, **options):
    runs = {cases.OURS: lambda i: sum(range(100)), "peer": lambda i: sum(range(1000))}
    return cases.CaseSpec("sum", "n100", lambda: cases.Case(runs, check, **options))


@pytest.fixture
def one_pool(monkeypatch):
    monkeypatch.setattr(cases, "_ROTATED_BYTES", 1)


def checked(case):
    with torch.inference_mode():
        case.check()


def test_a_wrong_op_is_not_timed():
    def check():
        raise cases.WrongResultError("off by one")

    with pytest.raises(cases.WrongResultError, match="off by one"):
        runner.run_case(spec_of(check), quick=True)


def test_a_figure_has_median_and_spread_of_one_call():
    ours, peer = runner.run_case(spec_of(lambda: None, num_bytes=800, repeats=10), quick=True)
    assert (ours.who, peer.who) == (cases.OURS, "peer")
    assert ours.ratio_to_ours == 1
    for figure in (ours, peer):
        assert 0 < figure.p10_ms <= figure.median_ms <= figure.p90_ms
        assert figure.rate == pytest.approx(800 / figure.median_ms / 1e6)
        assert figure.rounds >= 5


def test_a_figure_is_a_multiple_of_the_largest_floor(monkeypatch, capsys):
    def probe(ceiling):
        unit, limit = ("flops", "arithmetic") if ceiling.kind == "matmul" else ("bytes", "memory")
        return Probe(f"{limit} probe", lambda i: sum(range(2000)), 1000, unit, limit)

    monkeypatch.setattr(runner, "probe", probe)
    # At equal rates, four orders of magnitude more work takes longer, whatever the noise.
    ceilings = [cases.Ceiling("read", 10), cases.Ceiling("matmul", 100_000)]
    figures = runner.run_case(spec_of(lambda: None, ceilings=ceilings), quick=True)
    for figure in figures:
        assert [floor.limit for floor in figure.floors] == ["arithmetic", "memory"]
        for floor, work in zip(figure.floors, (100_000, 10), strict=True):
            assert floor.ms == pytest.approx(work / floor.rate / 1e6)
        assert figure.times_floor == pytest.approx(figure.median_ms / figure.floors[0].ms)
        assert figure.rate == pytest.approx(10 / figure.median_ms / 1e6)
        assert figure.rate_unit == "GB/s"
    report.print_case(figures)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("  floor: ")
    assert "(arithmetic: arithmetic probe, " in lines[2]
    assert f"{figures[0].times_floor:.2f}x of the floor (arithmetic)" in lines[4]


def test_a_store_is_held_against_a_copy(monkeypatch):
    monkeypatch.setattr(store_kv, "_NUM_TOKENS", (32,))
    monkeypatch.setattr(cases, "_ROTATED_BYTES", 1 << 19)
    spec = next(store_kv.cases(cases.Options()))
    ours = runner.run_case(spec, quick=True)[0]
    (floor,) = ours.floors
    assert (floor.limit, floor.probe) == ("copy", "copy_ of as many bytes")
    assert ours.times_floor == pytest.approx(floor.rate / ours.rate)


@pytest.mark.parametrize("dtype", [F32, BF16, INT8])
def test_the_work_of_a_decode(dtype):
    shape = paged_batch.BatchShape(3, 1, 100, 8, 2, 64, dtype)
    element = {F32: 4, BF16: 2, INT8: 1}[dtype]
    scales = 4 * 2 * 3 * 100 * 2 if dtype == INT8 else 0
    read, matmul = shape.ceilings
    assert (read.kind, read.work) == ("read", 2 * 3 * 100 * 2 * 64 * element + scales)
    assert (matmul.kind, matmul.work) == ("matmul", 4 * 3 * 100 * 8 * 64)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [F32, INT8, E4M3])
def test_gathered_numbers_are_those_of_the_pages(layout, dtype):
    pages = paged_kv.random_pages(6, 2, 8, dtype, layout)
    rows = torch.tensor([[4, 0], [3, 5]])
    taken = paged_kv.gathered(pages, rows, 19, layout)
    for sequence, token, head in ((0, 0, 1), (0, 18, 0), (1, 15, 1), (1, 16, 0)):
        page, offset = rows[sequence, token // 16], token % 16
        at = (page, offset, head) if layout == "NHD" else (page, head, offset)
        for key_or_value in (0, 1):
            element = pages[key_or_value][at].to(F32)
            scale = 1.0 if pages[2 + key_or_value] is None else pages[2 + key_or_value][page, head, offset]
            assert torch.equal(taken.numbers(F32)[key_or_value][sequence, head, token], element * scale)


@pytest.mark.usefixtures("one_pool")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [BF16, INT8])
def test_attention_on_any_pages_passes_its_check(layout, dtype):
    checked(attention_decode._build(paged_batch.BatchShape(3, 1, 37, 4, 2, 16, dtype), layout))
    if dtype == BF16:
        checked(attention_prefill._build(paged_batch.BatchShape(2, 5, 37, 4, 2, 16, dtype), layout))


@pytest.mark.usefixtures("one_pool")
def test_a_decode_that_ignores_the_scales_is_caught(monkeypatch):
    right = paged_batch.pagedkv.paged_attention

    def without_scales(*args, value_scales, **kwargs):
        return right(*args, value_scales=torch.ones_like(value_scales), **kwargs)

    monkeypatch.setattr(paged_batch.pagedkv, "paged_attention", without_scales)
    with pytest.raises(cases.WrongResultError, match="pagedkv is off by"):
        checked(attention_decode._build(paged_batch.BatchShape(3, 1, 37, 4, 2, 16, INT8), "NHD"))


@pytest.mark.usefixtures("one_pool")
def test_latent_attention_passes_its_check_and_zeros_do_not(monkeypatch):
    case = attention_mla._build(attention_mla.LatentShape(2, 37, 3, BF16))
    checked(case)
    monkeypatch.setattr(attention_mla.pagedkv, "mla_attention", lambda q_latent, *args, **kw: q_latent * 0)
    with pytest.raises(cases.WrongResultError, match="pagedkv is off by"):
        checked(case)


@pytest.mark.usefixtures("one_pool")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_sequences_on_one_prefix_read_what_their_copies_hold(monkeypatch, layout):
    common, copied = attention_shared_prefix._rows()
    assert common[:, :93].unique(dim=0).shape[0] == 1
    assert common.unique().numel() == 93 + 32 * 3
    assert copied.unique().numel() == copied.numel() == common.numel()
    heads = Heads(3, 1, 8)
    checked(attention_shared_prefix._build(heads, F32, layout))

    def moved_anywhere(pages, rows, new_rows):
        source = torch.arange(new_rows.numel()) % pages.key.shape[0]
        return paged_kv.KV(pages.key[source], pages.value[source])

    monkeypatch.setattr(attention_shared_prefix, "_moved", moved_anywhere)
    with pytest.raises(cases.WrongResultError, match="differ in bits"):
        checked(attention_shared_prefix._build(heads, F32, layout))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_skew_and_its_even_spread_pass_their_checks(layout):
    checked(attention_skewed._build([300, 17, 16, 1], F32, layout))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_plan_that_is_timed_also_runs(layout):
    checked(plan_attention._build(5, 2, 1, layout))
    checked(plan_attention._build(3, 0, 2, layout))


@pytest.mark.usefixtures("one_pool")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_dtype", [INT8, E4M3])
def test_a_quantizing_store_passes_its_check_and_a_lost_one_does_not(monkeypatch, layout, page_dtype):
    case = store_kv_quantized._build(store_kv.TokenShape(5, 2, 8, BF16), page_dtype, layout)
    checked(case)
    case = store_kv_quantized._build(store_kv.TokenShape(5, 2, 8, BF16), page_dtype, layout)
    monkeypatch.setattr(store_kv_quantized.pagedkv, "store_kv", lambda *args, **kwargs: None)
    with pytest.raises(cases.WrongResultError, match="stored rows differ"):
        checked(case)


@pytest.mark.usefixtures("one_pool")
def test_a_store_that_loses_rows_is_caught(monkeypatch):
    monkeypatch.setattr(store_kv.pagedkv, "store_kv", lambda *args, **kwargs: None)
    spec = cases.CaseSpec("store_kv", "T4", lambda: store_kv._build(store_kv.TokenShape(4, 2, 8, F32), "NHD"))
    with pytest.raises(cases.WrongResultError, match="stored rows differ"):
        runner.run_case(spec, quick=True)


def test_the_command_lists_writes_and_refuses(tmp_path, capsys):
    assert command.main(["--list", "--only", "attention_decode", "--only", "copy_pages"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 24 + 4
    assert "attention_decode/S8-ctx2048-Hq32-Hk8-D128-bf16" in names
    assert "attention_decode/S32-ctx512-Hq9-Hk3-D64-int8" in names
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
