"""cascade_attention: levels merged are as exact as attention over the whole, and misuse is refused with words."""

import dataclasses
import itertools
import math

import pytest
import torch

from pagedkv import PageTable, cascade_attention, plan_attention
from pagedkv.testing.attention_batch import attention_batch
from pagedkv.testing.numeric import assert_attention_close

F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8


def int32(values):
    return torch.tensor(list(values), dtype=torch.int32)


def rows_of(plan):
    """The pages of each sequence."""
    return [plan.page_indices[first:last].tolist() for first, last in itertools.pairwise(plan.page_indptr.tolist())]


def plan_like(plan, query_indptr, rows, kv_lens, **options):
    table = PageTable.from_rows(rows, kv_lens, plan.page_size)
    heads = {name: getattr(plan, name) for name in ("num_q_heads", "num_kv_heads", "head_dim", "value_dim")}
    return plan_attention(query_indptr, table, **heads, **options)


def cut(levels, q_lens, own_lens, **settings):
    """A batch whose sequences share prefixes, and the plans of its levels.

    levels: for each level above the last, how many neighbouring sequences share each of its prefixes, and its pages.
    """
    page_size = settings.get("page_size", 16)
    num_shared = sum(num_pages for _, num_pages in levels)
    kv_lens = [num_shared * page_size + own for own in own_lens]
    batch = attention_batch(q_lens, kv_lens, **settings)
    rows = rows_of(batch.plan)
    indptr, plans, start = [0, *itertools.accumulate(q_lens)], [], 0
    for width, num_pages in levels:
        leaders = range(0, len(rows), width)
        for leader in leaders:
            for row in rows[leader : leader + width]:
                row[start : start + num_pages] = rows[leader][start : start + num_pages]
        plans.append(
            plan_like(
                batch.plan,
                int32([*indptr[::width], indptr[-1]][: len(leaders) + 1]),
                [rows[leader][start : start + num_pages] for leader in leaders],
                [num_pages * page_size] * len(leaders),
                causal=False,
            )
        )
        start += num_pages
    plans.append(plan_like(batch.plan, int32(indptr), [row[start:] for row in rows], own_lens))
    whole = plan_like(batch.plan, int32(indptr), rows, kv_lens)
    return dataclasses.replace(batch, plan=whole), plans


def run(batch, plans, **options):
    arguments = batch.query, batch.key_pages, batch.value_pages, plans
    return cascade_attention(*arguments, layout=batch.layout, return_lse=True, **{**batch.options, **options})


def assert_close(state, batch):
    arguments = batch.query, batch.key_pages, batch.value_pages, batch.plan
    assert_attention_close(state, *arguments, layout=batch.layout, **batch.options)


CASES = {
    "one-level": ([], [1, 3], [40, 7], {}),
    "decode": ([(3, 20)], [1, 1, 1], [5, 16, 17], {}),
    "decode-bf16": ([(3, 20)], [1, 1, 1], [5, 16, 17], {"dtype": BF16, "group": 4}),
    "decode-f16-HND": ([(2, 3)], [1, 1], [1, 33], {"dtype": F16, "layout": "HND", "head_dim": 40, "value_dim": 8}),
    "append": ([(3, 9)], [7, 1, 12], [9, 1, 40], {"form": "interleaved"}),
    "prompts-over-a-prefix": ([(2, 17)], [30, 9], [30, 9], {"num_kv_heads": 1}),
    "three-levels": ([(4, 18), (2, 5)], [1, 2, 1, 5], [3, 2, 20, 270], {}),
    "three-levels-bf16-P1": ([(5, 40), (2, 30)], [1, 1, 1, 1, 1], [3, 2, 20, 1, 9], {"page_size": 1, "dtype": BF16}),
    "four-levels": ([(8, 3), (4, 2), (2, 1)], [1] * 8, [4] * 8, {"page_size": 3}),
    "soft-cap": ([(2, 18)], [1, 4], [30, 4], {"soft_cap": 2.0, "sm_scale": 0.5}),
    "int8": ([(2, 18)], [1, 4], [30, 4], {"dtype": INT8, "key_scales": 0.03, "value_scales": 0.02}),
    "without-new-tokens": ([(3, 4)], [0, 2, 0], [5, 6, 7], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_levels_are_as_exact_as_the_whole(case, any_backend):
    levels, q_lens, own_lens, settings = CASES[case]
    batch, plans = cut(levels, q_lens, own_lens, **settings)
    state = run(batch, plans, backend=any_backend)
    assert state.out.is_contiguous()
    assert_close(state, batch)


def test_without_lse_the_output_alone(any_backend):
    batch, plans = cut([(2, 3)], [1, 4], [5, 20], dtype=BF16)
    out = cascade_attention(batch.query, batch.key_pages, batch.value_pages, plans, backend=any_backend)
    assert torch.equal(out, run(batch, plans, backend=any_backend).out)


def test_scales_of_each_token(any_backend):
    batch, plans = cut([(2, 18)], [1, 4], [30, 4], dtype=torch.float8_e4m3fn)
    for name in ("key_scales", "value_scales"):
        assert isinstance(batch.options[name], torch.Tensor)
    assert_close(run(batch, plans, backend=any_backend), batch)


def test_one_copy_of_a_prefix_that_no_table_of_a_sequence_names(any_backend):
    """The sequences have copies of the prefix; the level reads one."""
    batch, plans = cut([(3, 20)], [1, 1, 1], [5, 16, 17])
    copied = batch.plan.page_indices.clone()
    new_ids = torch.arange(batch.key_pages.shape[0], batch.key_pages.shape[0] + len(copied))
    pages = [torch.cat([pages, pages[copied.long()]]) for pages in (batch.key_pages, batch.value_pages)]
    whole = dataclasses.replace(batch.plan, page_indices=new_ids.int(), max_page=int(new_ids[-1]), work=None)
    state = cascade_attention(batch.query, *pages, plans, return_lse=True, backend=any_backend)
    assert_attention_close(state, batch.query, *pages, whole)


def test_a_row_that_sees_no_key_of_any_level_gives_zero_and_minus_infinity(any_backend):
    batch, (shared, own) = cut([(2, 3)], [2, 1], [5, 20])
    hides_row_0 = [torch.ones(3 * 48, dtype=torch.bool), torch.ones(2 * 5 + 20, dtype=torch.bool)]
    hides_row_0[0][:48] = hides_row_0[1][:5] = False
    shared = plan_like(shared, shared.query_indptr, rows_of(shared), [48], causal=False, custom_mask=hides_row_0[0])
    own = plan_like(own, own.query_indptr, rows_of(own), [5, 20], custom_mask=hides_row_0[1])
    state = run(batch, [shared, own], backend=any_backend)
    assert state.out[0].eq(0).all()
    assert state.lse[0].eq(-math.inf).all()
    assert state.lse[1:].isfinite().all()


def test_a_level_that_shows_nothing_changes_nothing(any_backend):
    batch, plans = cut([(2, 3)], [2, 1], [5, 20])
    nothing = plan_like(batch.plan, plans[0].query_indptr, [[]], [0], causal=False)
    expected = run(batch, plans, backend=any_backend)
    for at in range(3):
        state = run(batch, [*plans[:at], nothing, *plans[at:]], backend=any_backend)
        assert torch.equal(state.out, expected.out)
        assert torch.equal(state.lse, expected.lse)


def test_an_empty_batch_gives_empty_results(any_backend):
    batch = attention_batch([], [])
    state = run(batch, [batch.plan, batch.plan], backend=any_backend)
    assert state.out.shape == (0, 4, 64)
    assert state.lse.shape == (0, 4)


def test_nothing_that_was_given_is_written(any_backend):
    batch, plans = cut([(2, 3)], [1, 4], [5, 20])
    before = [tensor.clone() for tensor in (batch.query, batch.key_pages.nan_to_num(), batch.value_pages.nan_to_num())]
    run(batch, plans, backend=any_backend)
    after = batch.query, batch.key_pages.nan_to_num(), batch.value_pages.nan_to_num()
    assert all(map(torch.equal, before, after))


OTHER = {
    "num_tokens": ({"q_lens": [1, 1]}, "plans must have the num_tokens of level 0, 5, got 2 at level 1"),
    "num_q_heads": ({"group": 4}, "plans must have the num_q_heads of level 0, 4, got 8 at level 1"),
    "num_kv_heads": ({"num_kv_heads": 1, "group": 4}, "the num_kv_heads of level 0, 2, got 1 at level 1"),
    "head_dim": ({"head_dim": 32, "value_dim": 64}, "plans must have the head_dim of level 0, 64, got 32"),
    "value_dim": ({"value_dim": 8}, "plans must have the value_dim of level 0, 64, got 8 at level 1"),
    "page_size": ({"page_size": 8}, "plans must have the page_size of level 0, 16, got 8 at level 1"),
}


@pytest.mark.parametrize("name", OTHER)
def test_plans_of_other_calls_are_refused(name):
    changes, words = OTHER[name]
    batch = attention_batch([1, 4], [20, 30])
    other = attention_batch(**{"q_lens": [1, 4], "kv_lens": [20, 30], **changes})
    with pytest.raises(ValueError, match=words):
        run(batch, [batch.plan, other.plan])


@pytest.mark.parametrize(
    "plans, error, words",
    [
        (lambda plan: [], ValueError, "plans must hold at least one level, got none"),
        (lambda plan: [plan, None], TypeError, "plans must hold an AttentionPlan a level, got NoneType at level 1"),
        (lambda plan: [(plan,)], TypeError, "got tuple at level 0. Build it with plan_attention"),
    ],
)
def test_what_is_no_plan_is_refused(plans, error, words):
    batch = attention_batch([1, 4], [20, 30])
    with pytest.raises(error, match=words):
        run(batch, plans(batch.plan))


def test_pages_of_another_pool_are_refused_in_the_words_of_the_op():
    batch, plans = cut([(2, 3)], [1, 4], [5, 20])
    with pytest.raises(ValueError, match=r"page ids of the plan must be below 2 \(N of key_pages\)"):
        cascade_attention(batch.query, batch.key_pages[:2], batch.value_pages[:2], plans)
    with pytest.raises(ValueError, match="query must have shape"):
        cascade_attention(batch.query[1:], batch.key_pages, batch.value_pages, plans)


def test_compiled_call_gives_the_same_bits():
    batch, plans = cut([(2, 3)], [1, 4], [5, 20], dtype=BF16)
    arguments = batch.query, batch.key_pages, batch.value_pages, plans
    compiled = torch.compile(cascade_attention, fullgraph=True, backend="aot_eager")(*arguments, return_lse=True)
    expected = cascade_attention(*arguments, return_lse=True)
    assert torch.equal(compiled.out, expected.out)
    assert torch.equal(compiled.lse, expected.lse)
