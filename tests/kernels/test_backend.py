"""The table of back ends: who is chosen, who never is, and what is said of the others."""

import logging
import re

import pytest
import torch

import pagedkv
from pagedkv.kernels import OpCall, reference, unregister_backend
from pagedkv.kernels.backend import OPS


@pytest.fixture
def toy():
    """Registers back ends "toy", whose ops note that they ran; all are removed afterwards."""
    names = []

    def register(name="toy", ops=OPS, **options):
        ran = []

        def noted(op):
            def run(*args):
                ran.append(op)
                return getattr(reference, op)(*args)

            return run

        pagedkv.register_backend(name, ops={op: noted(op) for op in ops}, **options)
        names.append(name)
        return ran

    yield register
    for name in names:
        unregister_backend(name)


def test_a_registered_backend_runs_every_op_when_named(toy, smallest_calls):
    ran = toy()
    for op in OPS:
        smallest_calls[op](backend="toy")
    assert ran == list(OPS)


def test_auto_takes_the_highest_priority_that_can(toy, smallest_calls):
    low, high = toy("low", priority=-200), toy("high", priority=50)
    for op in OPS:
        smallest_calls[op]()
    assert high == list(OPS)
    assert low == []
    assert next(iter(pagedkv.backends())) == "high"
    assert list(pagedkv.backends())[-1] == "low"


def test_auto_passes_over_what_rejects_the_call_is_unavailable_or_lacks_the_op(toy, caplog, smallest_calls):
    rejecting = toy("picky", priority=30, rejects=lambda call: "it is Monday" if call.op == "gather_kv" else None)
    absent = toy("absent", priority=20, unavailable=lambda: "no such device")
    partial = toy("partial", priority=10, ops=["store_kv"])
    able = toy("able", priority=5)
    with caplog.at_level(logging.INFO, logger="pagedkv"):
        smallest_calls["gather_kv"]()
        smallest_calls["gather_kv"]()
    assert (rejecting, absent, partial, able) == ([], [], [], ["gather_kv", "gather_kv"])
    assert caplog.messages == [
        "backend auto: able for gather_kv on cpu in float32; not picky (it is Monday), absent (no such device), "
        "partial (it has no gather_kv)"
    ], "said once a kind of call"


def test_an_explicit_backend_never_falls_back(toy, smallest_calls):
    ran = toy("picky", rejects=lambda call: "it is Monday", priority=10)
    others = toy("able")
    for op in OPS:
        expected = rf"backend 'picky' cannot run {op}: it is Monday\. Tried: .*able \(ok\).*reference \(ok\)"
        with pytest.raises(pagedkv.BackendUnavailableError, match=expected):
            smallest_calls[op](backend="picky")
    assert ran == others == []


def test_an_explicit_backend_without_the_op_or_the_machine_says_so(toy, smallest_calls):
    toy("partial", ops=["store_kv"])
    toy("absent", unavailable=lambda: "no such device")
    with pytest.raises(pagedkv.BackendUnavailableError, match=r"'partial' cannot run gather_kv: it has no gather_kv\."):
        smallest_calls["gather_kv"](backend="partial")
    with pytest.raises(pagedkv.BackendUnavailableError, match=r"'absent' cannot run store_kv: no such device\."):
        smallest_calls["store_kv"](backend="absent")
    assert pagedkv.backends()["absent"].reason == "no such device"
    assert not pagedkv.backends()["absent"].available
    assert pagedkv.backends()["partial"].ops == ("store_kv",)


def test_the_native_core_names_what_it_cannot_run(monkeypatch):
    monkeypatch.delenv("PAGEDKV_NATIVE", raising=False)
    table = pagedkv.PageTable.from_rows([[1]], seq_lens=[3], page_size=4)
    plan = pagedkv.plan_attention(
        torch.tensor([0, 1], dtype=torch.int32), table, num_q_heads=1, num_kv_heads=1, head_dim=7
    )
    arguments = torch.zeros(1, 1, 7), *torch.zeros(2, 2, 4, 1, 7), plan
    with pytest.raises(pagedkv.BackendUnavailableError, match=r"backend 'cpu' cannot run paged_attention: .*7 and 7.*"):
        pagedkv.paged_attention(*arguments, backend="cpu")
    assert pagedkv.paged_attention(*arguments).shape == (1, 1, 7)


def test_unknown_names_list_the_known(smallest_calls):
    known = re.escape(", ".join(pagedkv.backends()))
    for op in OPS:
        with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*, got 'gpu'\."):
            smallest_calls[op](backend="gpu")
    assert set(known.split(r",\ ")) == {"cpu", "reference", "triton"}


def test_register_backend_refuses_taken_names_and_unknown_ops(toy):
    toy()
    for name in ("toy", "auto", "cpu"):
        with pytest.raises(ValueError, match=rf"name of a back end must be new, got '{name}'\. Taken: auto, .*toy"):
            pagedkv.register_backend(name, ops={})
    with pytest.raises(ValueError, match=r"ops must be among store_kv, .*merge_states, got sort_kv, zip_kv\."):
        pagedkv.register_backend("new", ops={"zip_kv": print, "sort_kv": print, "store_kv": print})
    with pytest.raises(ValueError, match=r"name must be a registered back end, got 'new'\. Registered: "):
        unregister_backend("new")


def test_a_call_describes_itself():
    call = OpCall(
        "paged_attention", "cpu", (torch.float32, torch.bfloat16, torch.bfloat16), 64, 64, frozenset({"sinks"})
    )
    assert str(call) == "paged_attention on cpu in float32/bfloat16 with sinks"
