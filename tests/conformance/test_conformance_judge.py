"""What the suite's own parts promise: cases that leave no trace, copies of tensors, refusals, reports."""

import pytest
import torch

import pagedkv
from pagedkv.kernels import reference, unregister_backend
from pagedkv.kernels.backend import OPS
from pagedkv.testing.attention_batch import attention_batch
from pagedkv.testing.bits import same_bits
from pagedkv.testing.conformance import ConformanceCase, conformance_cases, run_conformance
from pagedkv.testing.conformance.bit_patterns import bit_patterns
from pagedkv.testing.conformance.case import threads_of_caller
from pagedkv.testing.conformance.judge import assert_rounded_once, placed
from pagedkv.testing.conformance.option_pairs import option_pairs, random_mask
from pagedkv.testing.conformance.report import run_cases

CASES = {str(case): case for case in conformance_cases()}
OF_OP = {op: [case.situation for case in CASES.values() if case.op == op] for op in OPS}


@pytest.fixture
def registered():
    """Registers back ends; all are removed afterwards."""
    before = set(pagedkv.backends())
    yield pagedkv.register_backend
    for name in set(pagedkv.backends()) - before:
        unregister_backend(name)


def test_a_byte_beside_the_pages_is_found(registered):
    def spills(key, value, key_pages, *others):
        reference.store_kv(key, value, key_pages, *others)
        memory = torch.empty(0, dtype=key_pages.dtype).set_(key_pages.untyped_storage())
        memory[-1:] = 0

    registered("spilling", ops={"store_kv": spills})
    failed = run_cases([CASES["store_kv-sliced-NHD"]], "spilling", "cpu").failed
    assert failed["store_kv-sliced-NHD"] == "AssertionError: bytes outside key_pages must stay as they were."


def test_a_report_counts_and_names_what_did_not_pass(registered):
    def explodes(*arguments):
        raise TypeError("no such kernel")

    ops = {"gather_kv": explodes, "merge_states": reference.merge_states}
    registered("odd", ops=ops, rejects=lambda call: "no half" if torch.float16 in call.dtypes else None)
    report = run_conformance("odd", ops=["merge_states", "gather_kv", "copy_pages"])
    assert report.failed["gather_kv-bfloat16"] == "TypeError: no such kernel"
    assert report.not_offered["merge_states-float16"] == "merge_states: no half"
    lines = str(report).splitlines()
    halves = {op: [name for name in OF_OP[op] if name.replace("bfloat16", "").endswith("float16")] for op in OPS}
    num_merges, num_gathers = (len(OF_OP[op]) - len(halves[op]) for op in ("merge_states", "gather_kv"))
    num_others = len(halves["merge_states"]) + len(halves["gather_kv"]) + len(OF_OP["copy_pages"])
    assert lines[0] == f"odd: {num_merges} passed, {num_gathers} failed, {num_others} not offered"
    assert "  failed gather_kv-bfloat16: TypeError: no such kernel" in lines
    assert f"  not offered merge_states: no half: {', '.join(halves['merge_states'])}" in lines
    assert any(line.startswith("  not offered copy_pages: it has no copy_pages: between-two, ") for line in lines)


def test_a_back_end_that_this_machine_cannot_run_offers_nothing(registered):
    registered("absent", ops={op: getattr(reference, op) for op in OPS}, unavailable=lambda: "no such device")
    report = run_conformance("absent", ops=["gather_kv", "merge_states"])
    num_cases = len(OF_OP["gather_kv"]) + len(OF_OP["merge_states"])
    assert (report.passed, report.failed, len(report.not_offered)) == ((), {}, num_cases)
    assert report.not_offered["gather_kv-bfloat16"] == "gather_kv: no such device"


def test_a_case_runs_the_same_each_time_and_leaves_no_trace():
    seen = []
    case = ConformanceCase("gather_kv", "seen", lambda backend, device: seen.append((torch.rand(3), torch.empty(2))))
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    mode = torch.are_deterministic_algorithms_enabled()
    case("reference")
    case("reference")
    assert torch.equal(torch.rand(2), expected)
    assert torch.are_deterministic_algorithms_enabled() == mode
    assert torch.equal(seen[0][0], seen[1][0])
    assert all(bool(empty.isnan().all()) for _, empty in seen)


def test_placed_tensors_keep_strides_and_what_they_share_but_not_their_memory():
    memory = torch.randn(5, 6)
    given = {"a": memory[1:, ::2], "b": memory.T, "c": torch.empty(0, 3), "dim": 4}
    there = placed(given, torch.device("cpu"))
    assert there["dim"] == 4
    for name in ("a", "b", "c"):
        assert same_bits(there[name], given[name])
        assert there[name].stride() == given[name].stride()
    there["b"].zero_()
    assert int(there["a"].count_nonzero()) == 0
    assert bool(memory.count_nonzero())


def test_placed_on_another_device_a_plan_is_there_too_and_left_to_its_back_end():
    batch = attention_batch([1], [20], custom_mask=torch.ones(20, dtype=torch.bool))
    plan = placed({"plan": batch.plan}, torch.device("meta"))["plan"]
    tensors, masks, numbers = plan.pack()
    assert all(tensor.device.type == "meta" for tensor in (*tensors, *masks))
    assert plan.work is None
    assert numbers == batch.plan.pack()[2]


def test_a_case_on_another_device_lets_ops_that_are_not_deterministic_run():
    modes = []

    def noted(backend, device):
        modes.append((device, torch.is_deterministic_algorithms_warn_only_enabled()))

    for device in ("cpu", "meta"):
        ConformanceCase("gather_kv", "noted", noted)("reference", device)
    assert modes == [(torch.device("cpu"), False), (torch.device("meta"), True)]
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_refusal_must_name_the_culprit_and_come_before_the_first_write(registered):
    def says_nothing(*arguments):
        raise ValueError("slots are bad")

    def checks_too_late(key, value, key_pages, value_pages, slot_mapping, *scales):
        key_pages.zero_()
        reference.store_kv(key, value, key_pages, value_pages, slot_mapping, *scales)

    refusal = [CASES["store_kv-refuses-a-slot-beyond"]]
    registered("mute", ops={"store_kv": says_nothing})
    registered("late", ops={"store_kv": checks_too_late})
    (words,) = run_cases(refusal, "mute", "cpu").failed.values()
    assert words == "AssertionError: the error must name 20, got 'slots are bad'."
    (words,) = run_cases(refusal, "late", "cpu").failed.values()
    assert words.startswith("AssertionError: key_pages must have the bits expected, got 480 of 480 elements")


def test_unknown_names_list_the_known():
    for name in ("auto", "gpu"):
        with pytest.raises(ValueError, match=rf"backend must be one of .*reference.*, got '{name}'\."):
            run_conformance(name)
    with pytest.raises(ValueError, match=r"ops must be among store_kv, .*merge_states, got sort_kv, zip_kv\."):
        conformance_cases("zip_kv", "store_kv", "sort_kv")


def test_bit_patterns_hold_every_kind_of_number_and_keep_to_their_dtype():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = bit_patterns(3, 2000, dtype=dtype)
        bits = x.view(torch.int32 if dtype == torch.float32 else torch.int16)
        assert (x.shape, x.dtype) == ((3, 2000), dtype)
        assert x.isinf().any()
        assert bits[x.isnan()].unique().numel() > 8
        assert ((x.abs() > 0) & (x.abs() < torch.finfo(dtype).tiny)).any()
        assert ((x == 0) & x.signbit()).any()
    assert bit_patterns(5000, dtype=torch.float8_e4m3fn).view(torch.uint8).unique().numel() == 256
    assert bit_patterns(0, 3, dtype=torch.int8).shape == (0, 3)


def test_pairs_are_of_options_that_do_not_set_the_same():
    options = {"a": {"x": 1}, "b": {"y": 2}, "c": {"x": 3}}
    assert dict(option_pairs(options)) == {"a-and-b": {"x": 1, "y": 2}, "b-and-c": {"y": 2, "x": 3}}


def test_a_mask_hides_all_from_the_first_row_and_some_from_others():
    mask = random_mask([2, 30], [9, 40])
    assert mask.shape == (2 * 9 + 30 * 40,)
    assert not mask[:9].any()
    assert mask[9:].any()
    assert not mask[9:].all()


def test_16_bits_must_be_rounded_to_nearest():
    exact = torch.tensor([1.0, 1.003, -3.01, 250.3, 1e-39], dtype=torch.float64)
    plain = exact.float()
    assert_rounded_once("out", exact.bfloat16(), exact, plain)
    cut = (exact.float().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    with pytest.raises(AssertionError, match=r"out must be rounded to nearest, got .* more than half a unit"):
        assert_rounded_once("out", cut, exact, plain)


def test_a_case_gives_the_back_end_the_threads_of_its_caller_and_itself_one():
    seen = []

    def noted(backend, device):
        with threads_of_caller():
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    torch.set_num_threads(3)
    ConformanceCase("gather_kv", "noted", noted)("reference")
    assert seen == [3, 1]
    assert torch.get_num_threads() == 3
