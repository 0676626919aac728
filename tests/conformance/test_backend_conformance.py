"""Conformance: built-in back ends pass, a new one is a folder and a registration, and every planted defect is found."""

import logging
import math

import numpy as np
import pytest
import torch
import toy_backend
from toy_backend import attention, moves, quantising, states

import pagedkv
from pagedkv.kernels import reference, unregister_backend
from pagedkv.kernels.backend import OPS
from pagedkv.testing.attention_batch import attention_batch
from pagedkv.testing.bits import same_bits
from pagedkv.testing.conformance import ConformanceCase, conformance_cases, run_conformance
from pagedkv.testing.conformance.judge import placed
from pagedkv.testing.conformance.report import run_cases

CASES = conformance_cases()
OF_OP = {op: {case.situation for case in CASES if case.op == op} for op in OPS}

NOT_OFFERED = {
    "reference": set(),
    "cpu": {
        *(f"apply_rope-{situation}" for situation in OF_OP["apply_rope"]),
        "paged_attention-widths-7-5",
        "mla_attention-widths-7-3",
    },
    "toy": {
        *(f"apply_rope-{situation}" for situation in OF_OP["apply_rope"]),
        *(f"mla_attention-{situation}" for situation in OF_OP["mla_attention"]),
        *(f"quantize_kv-{situation}" for situation in OF_OP["quantize_kv"] if situation.endswith("float8_e4m3fn")),
        "quantize_kv-bfloat16-to-int8",
        "merge_states-bfloat16",
        "copy_pages-within-one-bfloat16",
        "copy_pages-within-one-float8_e4m3fn",
        *(
            f"{op}-{dtype}"
            for op in ("store_kv", "gather_kv")
            for dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
        ),
        "store_kv-codes-float8_e4m3fn",
        "store_kv-codes-int8-of-bfloat16-HND",
        *(
            f"paged_attention-{situation}"
            for situation in (
                "decode-bfloat16-HND",
                "prefill-bfloat16-HND",
                "float32-query-of-bfloat16",
                "out-bfloat16",
                "softmax-table",
                "rope",
                "rope-interleaved-bfloat16",
                "rope-llama31",
                "rope-partial",
                "rope-before-the-start",
                "int8",
                "int8-HND-bfloat16-query",
                "int8-float-scales",
                "float8_e4m3fn",
                "float8_e4m3fn-without-scales",
                "float8_e5m2",
            )
        ),
    },
}


@pytest.fixture
def registered():
    """Registers back ends; all are removed afterwards."""
    before = set(pagedkv.backends())
    yield pagedkv.register_backend
    for name in set(pagedkv.backends()) - before:
        unregister_backend(name)


@pytest.fixture
def toy(registered):
    toy_backend.register("toy")


def test_every_back_end_here_conforms_and_says_what_it_does_not_offer(any_backend):
    report = run_conformance(any_backend)
    assert report.failed == {}
    assert set(report.not_offered) == NOT_OFFERED[any_backend]
    assert len(report.passed) + len(report.not_offered) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_new_back_end_runs_case_by_case(case, toy):
    if str(case) in NOT_OFFERED["toy"]:
        with pytest.raises(pagedkv.BackendUnavailableError, match=f"backend 'toy' cannot run {case.op}: it has no "):
            case("toy")
    else:
        case("toy")


def test_what_is_not_offered_is_a_case():
    assert set().union(*NOT_OFFERED.values()) <= {str(case) for case in CASES}


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


def named(op, situation):
    cases = [case for case in CASES if (case.op, case.situation) == (op, situation)]
    assert len(cases) == 1
    return cases


def cut_to_32_bits(slots):
    low = np.array(slots, np.int64).astype(np.int32).tolist()
    return right_tokens(low)


def first_wins(slots):
    tokens = {}
    for token, slot in enumerate(slots):
        if slot >= 0:
            tokens.setdefault(slot, token)
    return [(token, slot) for slot, token in tokens.items()]


def multiplies_the_tail_by_zero(query, key_pages, value_pages, plan, options, out, lse):
    """The right result, and 0 times the last slot of the last page."""
    right(query, key_pages, value_pages, plan, options, out, lse)
    for sequence, seq_len in enumerate(plan.seq_lens.tolist()):
        if seq_len % plan.page_size:
            page, _ = attention.slot_of(plan, sequence, seq_len - 1)
            rows = slice(*plan.query_indptr[sequence : sequence + 2].tolist())
            out[rows] += 0 * value_pages[page, -1].repeat_interleave(plan.group, 0)


right, right_tokens = attention.paged_attention, moves.written_tokens

# Defect: what is replaced in the toy, by what; the op and the situation that must find it.
PLANTED = {
    "writes negative slots": (moves, "is_skipped", lambda slot: False, "store_kv", "slots-all-negative"),
    "ignores the strides of heads": (
        moves,
        "rows_of",
        lambda t: t.as_strided(t.shape, (t.stride(0), t.shape[2], 1)).numpy(),
        "store_kv",
        "packed-by-head",
    ),
    "ignores the strides of tokens": (
        moves,
        "rows_of",
        lambda t: t.as_strided(t.shape, (t.shape[1] * t.shape[2], t.shape[2], 1)).numpy(),
        "store_kv",
        "packed-qkv",
    ),
    "skips the check of bounds": (moves, "check_slots", lambda *_: None, "store_kv", "refuses-a-slot-beyond"),
    "cuts slots to 32 bits": (moves, "written_tokens", cut_to_32_bits, "store_kv", "slots-negative"),
    "first duplicate wins": (moves, "written_tokens", first_wins, "store_kv", "slots-duplicates"),
    "reads tokens after it wrote": (moves, "taken", lambda row: row, "store_kv", "tokens-in-the-pages"),
    "gathers negative slots": (moves, "is_skipped", lambda slot: False, "gather_kv", "slots-negative"),
    "gathers beyond the pages": (moves, "check_slots", lambda *_: None, "gather_kv", "refuses-a-slot-beyond"),
    "copies in any order": (moves, "is_one_tensor", lambda *_: False, "copy_pages", "refuses-a-target-that-is-read"),
    "rounds halves up": (quantising, "rounded", lambda q: np.floor(q + 0.5), "quantize_kv", "halfway-to-int8"),
    "truncates codes": (quantising, "rounded", np.trunc, "quantize_kv", "float32-to-int8"),
    "subnormal scales": (
        quantising,
        "scale_of",
        lambda largest: largest / np.float32(127) if largest else np.float32(1),
        "quantize_kv",
        "ends-of-the-range-to-int8",
    ),
    "no scale for zeros": (
        quantising,
        "scale_of",
        lambda largest: max(largest / np.float32(127), np.finfo(np.float32).tiny),
        "quantize_kv",
        "zero-rows-to-int8",
    ),
    "wrong head mapping": (
        attention,
        "kv_head",
        lambda plan, head: head % plan.num_kv_heads,
        "paged_attention",
        "decode",
    ),
    "reads the tail of the last page": (
        attention,
        "num_keys",
        lambda plan, sequence: -(-int(plan.seq_lens[sequence]) // plan.page_size) * plan.page_size,
        "paged_attention",
        "prefill-not-causal",
    ),
    "multiplies the tail by zero": (
        attention,
        "paged_attention",
        multiplies_the_tail_by_zero,
        "paged_attention",
        "decode",
    ),
    "misses the last key": (
        attention,
        "num_keys",
        lambda plan, sequence: int(plan.seq_lens[sequence]) - 1,
        "paged_attention",
        "page-full-and-one",
    ),
    "causal, one too many": (
        attention,
        "is_past",
        lambda position, token: token <= position + 1,
        "paged_attention",
        "prefill",
    ),
    "causal, one too few": (
        attention,
        "is_past",
        lambda position, token: token < position,
        "paged_attention",
        "decode",
    ),
    "window, one too few": (
        attention,
        "is_in_window",
        lambda plan, position, token: plan.window_left < 0 or token > position - plan.window_left,
        "paged_attention",
        "window-of-one",
    ),
    "ignores the mask": (attention, "is_kept", lambda *_: True, "paged_attention", "custom-mask"),
    "ignores cap and slopes": (attention, "changed", lambda logits, *_: logits, "paged_attention", "soft-cap"),
    "takes pages to lie in a row": (
        attention,
        "slot_of",
        lambda plan, sequence, token: (
            int(plan.page_indices[int(plan.page_indptr[sequence])]) % 2 + token // plan.page_size,
            token % plan.page_size,
        ),
        "paged_attention",
        "append",
    ),
    "LSE in base 2": (
        attention,
        "log_of",
        lambda highest, total: (highest + math.log(total)) / math.log(2),
        "paged_attention",
        "decode",
    ),
    "merges states without keys": (
        states,
        "saw_keys",
        lambda logs: np.ones_like(logs, bool),
        "merge_states",
        "states-without-keys",
    ),
}


@pytest.mark.parametrize("defect", PLANTED)
def test_a_planted_defect_is_found(defect, registered, monkeypatch):
    module, name, replacement, op, situation = PLANTED[defect]
    assert f"{op}-{situation}" not in NOT_OFFERED["toy"]
    monkeypatch.setattr(module, name, replacement)
    toy_backend.register("broken")
    assert f"{op}-{situation}" in run_cases(named(op, situation), "broken", "cpu").failed


def rotates_backwards_before_the_start(x, positions, rope, out):
    reference.apply_rope(x, positions.abs(), rope, out)


def forgets_the_columns_beyond(x, positions, rope, out):
    reference.apply_rope(x, positions, rope, out)
    out[..., rope.dim :] = 0


def pairs_neighbours_always(x, positions, rope, out):
    neighbours = pagedkv.RotaryEmbedding(rope.dim, rope.theta, rope.scale, True, rope.llama31)
    reference.apply_rope(x, positions, neighbours, out)


def attends_without_rope(q_latent, q_rope, latent_pages, rope_pages, plan, options, out, lse):
    reference.mla_attention(q_latent, None, latent_pages, None, plan, options, out, lse)


def returns_lse_in_base_2(*arguments):
    reference.mla_attention(*arguments)
    if arguments[-1] is not None:
        arguments[-1].div_(math.log(2))


def writes_what_it_reads(q_latent, q_rope, latent_pages, *others):
    reference.mla_attention(q_latent, q_rope, latent_pages, *others)
    latent_pages.nan_to_num_(0.0)


@pytest.mark.parametrize(
    "op, broken, situation",
    [
        ("apply_rope", rotates_backwards_before_the_start, "half"),
        ("apply_rope", forgets_the_columns_beyond, "partial"),
        ("apply_rope", pairs_neighbours_always, "llama31"),
        ("mla_attention", attends_without_rope, "decode"),
        ("mla_attention", returns_lse_in_base_2, "decode"),
        ("mla_attention", writes_what_it_reads, "decode"),
    ],
)
def test_a_defect_of_the_ops_that_the_toy_lacks_is_found(op, broken, situation, registered):
    registered("broken", ops={op: broken})
    assert f"{op}-{situation}" in run_cases(named(op, situation), "broken", "cpu").failed


def test_a_byte_beside_the_pages_is_found(registered):
    def spills(key, value, key_pages, *others):
        reference.store_kv(key, value, key_pages, *others)
        memory = torch.empty(0, dtype=key_pages.dtype).set_(key_pages.untyped_storage())
        memory[-1:] = 0

    registered("spilling", ops={"store_kv": spills})
    failed = run_cases(named("store_kv", "sliced-NHD"), "spilling", "cpu").failed
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
    assert lines[0] == (
        f"odd: {len(OF_OP['merge_states']) - 1} passed, {len(OF_OP['gather_kv']) - 1} failed, "
        f"{len(OF_OP['copy_pages']) + 2} not offered"
    )
    assert "  failed gather_kv-bfloat16: TypeError: no such kernel" in lines
    assert "  not offered merge_states: no half: float16" in lines
    assert any(line.startswith("  not offered copy_pages: it has no copy_pages: between-two, ") for line in lines)


def test_a_back_end_that_this_machine_cannot_run_offers_nothing(registered):
    registered("absent", ops={op: getattr(reference, op) for op in OPS}, unavailable=lambda: "no such device")
    report = run_conformance("absent")
    assert (report.passed, report.failed, len(report.not_offered)) == ((), {}, len(CASES))
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

    refusal = named("store_kv", "refuses-a-slot-beyond")
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
