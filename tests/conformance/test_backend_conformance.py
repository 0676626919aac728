"""Back ends here pass every case and say what they do not offer; a new one is a folder and a registration."""

import logging

import pytest
import torch
import toy_backend

import pagedkv
from pagedkv.kernels import unregister_backend
from pagedkv.kernels.backend import OPS
from pagedkv.testing.conformance import conformance_cases, run_conformance

CASES = conformance_cases()
OF_OP = {op: {case.situation for case in CASES if case.op == op} for op in OPS}


def cases_of(op, *words):
    """Names of the cases of an op whose situation has one of the words; without words, all."""
    return {f"{op}-{name}" for name in OF_OP[op] if not words or any(word in name for word in words)}


NOT_OFFERED = {
    "reference": set(),
    "cpu": {*cases_of("apply_rope"), "paged_attention-widths-7-5", "mla_attention-widths-7-3"},
    "triton": set(),
    "toy": {
        *cases_of("apply_rope"),
        *cases_of("rope_store_kv"),
        *cases_of("mla_attention"),
        *cases_of("store_kv", "bfloat16", "float8"),
        *cases_of("gather_kv", "bfloat16", "float8"),
        *cases_of("copy_pages", "bfloat16", "float8"),
        *cases_of("quantize_kv", "bfloat16", "float8"),
        *cases_of("merge_states", "bfloat16"),
        *cases_of("paged_attention", "bfloat16", "float8", "int8", "rope", "softmax-table"),
    },
}


@pytest.fixture
def registered():
    """Registers back ends; all are removed afterwards."""
    before = set(pagedkv.backends())
    yield pagedkv.register_backend
    for name in set(pagedkv.backends()) - before:
        unregister_backend(name)


def test_every_back_end_here_conforms_and_says_what_it_does_not_offer(any_backend):
    if any_backend == "reference":
        torch.set_num_threads(1)  # its tensors are too small to be worth more
    report = run_conformance(any_backend)
    assert report.failed == {}
    assert set(report.not_offered) == NOT_OFFERED[any_backend]
    assert len(report.passed) + len(report.not_offered) == len(CASES)


def test_a_new_back_end_conforms_and_says_what_it_does_not_offer(registered):
    toy_backend.register("toy")
    torch.set_num_threads(1)
    report = run_conformance("toy")
    assert report.failed == {}
    assert set(report.not_offered) == NOT_OFFERED["toy"]
    assert all(": it has no " in reason for reason in report.not_offered.values())
    assert len(report.passed) + len(report.not_offered) == len(CASES)


@pytest.mark.parametrize("case", conformance_cases("gather_kv"), ids=str)
def test_a_new_back_end_runs_case_by_case(case, registered):
    toy_backend.register("toy")
    if str(case) in NOT_OFFERED["toy"]:
        with pytest.raises(
            pagedkv.BackendUnavailableError, match=r"backend 'toy' cannot run gather_kv: it has no (bf|f)lo"
        ):
            case("toy")
    else:
        case("toy")


def test_cases_have_names_of_their_own_and_every_op_has_many():
    assert len({str(case) for case in CASES}) == len(CASES)
    assert all(len(situations) >= 10 for situations in OF_OP.values())
    assert [case.op for case in CASES] == sorted((case.op for case in CASES), key=OPS.index)


def test_auto_takes_the_new_back_end_and_passes_on_what_it_rejects(registered, caplog, smallest_calls):
    toy_backend.register("toy", priority=50)
    assert next(iter(pagedkv.backends())) == "toy"
    pages = torch.randn(2, 3, 4, 1, 8)
    with caplog.at_level(logging.INFO, logger="pagedkv"):
        smallest_calls["store_kv"]()
        smallest_calls["apply_rope"]()
        pagedkv.gather_kv(*pages.bfloat16(), torch.tensor([3]))
        pagedkv.gather_kv(*pages.half(), torch.tensor([3]))
    first, second, third, fourth = caplog.messages
    assert first == "backend auto: toy for store_kv on cpu in float32"
    assert second.startswith("backend auto: reference for apply_rope on cpu in float32; not toy (it has no apply_rope)")
    assert "for gather_kv on cpu in bfloat16; not toy (it has no bfloat16)" in third
    assert "backend auto: toy" not in third
    assert fourth == "backend auto: toy for gather_kv on cpu in float16"


def test_unknown_names_list_the_known():
    for name in ("auto", "gpu"):
        with pytest.raises(ValueError, match=rf"backend must be one of .*reference.*, got '{name}'\."):
            run_conformance(name)
    with pytest.raises(ValueError, match=r"ops must be among store_kv, .*merge_states, got sort_kv, zip_kv\."):
        conformance_cases("zip_kv", "store_kv", "sort_kv")
