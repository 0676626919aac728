"""The suite names a failing case for every defect planted in the toy back end and in the reference."""

import math

import numpy as np
import pytest
import toy_backend
from planted import PLANTED
from toy_backend import attention, moves, quantising, states

import pagedkv
from pagedkv.kernels import unregister_backend
from pagedkv.testing.conformance import conformance_cases
from pagedkv.testing.conformance.report import run_cases

CASES = {str(case): case for case in conformance_cases()}


@pytest.fixture
def broken():
    """Removes the back end of this name afterwards."""
    yield
    unregister_backend("broken")


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
TOY_DEFECTS = {
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


@pytest.mark.parametrize("defect", TOY_DEFECTS)
def test_a_defect_planted_in_the_toy_is_found(defect, broken, monkeypatch):
    module, name, replacement, op, situation = TOY_DEFECTS[defect]
    case = CASES[f"{op}-{situation}"]
    monkeypatch.setattr(module, name, replacement)
    toy_backend.register("broken")
    assert str(case) in run_cases([case], "broken", "cpu").failed


@pytest.mark.parametrize("defect", PLANTED)
def test_a_defect_planted_in_the_reference_is_found(defect, broken):
    op, replacement, situation = PLANTED[defect]
    case = CASES[f"{op}-{situation}"]
    pagedkv.register_backend("broken", ops={op: replacement})
    words = run_cases([case], "broken", "cpu").failed[str(case)]
    assert words.startswith("AssertionError: ")


def test_many_defects_are_planted_in_every_op():
    assert len(PLANTED) >= 80
    assert {op for op, _, _ in PLANTED.values()} == {case.op for case in CASES.values()}
