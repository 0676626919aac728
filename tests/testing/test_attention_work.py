"""The reader of a plan's work finds planted errors: what is missing, taken twice, or shared where pages differ."""

import dataclasses

import pytest
import torch

from pagedkv import PageTable, plan_attention
from pagedkv.testing.attention_work import assert_covers_once, read_work

pytestmark = pytest.mark.native

# Of the first item, which two sequences share, and of the first tile; the work begins with five numbers.
TILE, TILE_NUMBERS, ITEM_NUMBERS = 5, 6, 7


@pytest.fixture
def plan():
    table = PageTable.from_rows([[0, 1, 2, 3], [0, 1, 2, 4]], seq_lens=[60, 50], page_size=16)
    query_indptr = torch.tensor([0, 1, 2], dtype=torch.int32)
    return plan_attention(query_indptr, table, num_q_heads=4, num_kv_heads=2, head_dim=8)


def item_at(work, number):
    return TILE + TILE_NUMBERS * len(work.tiles) + ITEM_NUMBERS * number


def changed(plan, at, value):
    work = plan.work.clone()
    work[at] = value
    return dataclasses.replace(plan, work=work)


def test_work_is_read_by_name(plan):
    work = read_work(plan)
    assert [(tile.sequence, tile.rows, tile.chunk_last) for tile in work.tiles] == [(0, 2, 1), (1, 2, 1)]
    assert work.shared_items == work.items
    assert all(work.members_of(item) == [0, 1] and work.rows_of(item) == 4 for item in work.items)
    assert {item.shared_tokens for item in work.items} == {48}
    assert_covers_once(plan)


@pytest.mark.parametrize(
    "what, place, value",
    [
        ("rows left out", lambda work: TILE + 2, 1),
        ("a chunk left out", lambda work: item_at(work, 0) + 5, 0),
        ("a head left out", lambda work: item_at(work, 0) + 3, 0),
        ("a member left out", lambda work: item_at(work, 0) + 1, 1),
        ("a member twice", lambda work: item_at(work, len(work.items)) + 1, 0),
        ("tokens of other pages", lambda work: item_at(work, 0) + 6, 49),
        ("states that meet", lambda work: TILE + TILE_NUMBERS + 5, 0),
        ("too few states", lambda work: 0, 7),
        ("too few rows", lambda work: 1, 3),
        ("a result that nobody merges", lambda work: TILE + 5, -1),
    ],
)
def test_planted_errors_are_found(plan, what, place, value):
    with pytest.raises(AssertionError):
        assert_covers_once(changed(plan, place(read_work(plan)), value))


def test_a_plan_without_work_is_refused(plan):
    with pytest.raises(ValueError, match="plan must have work, got None"):
        read_work(dataclasses.replace(plan, work=None))
    with pytest.raises(ValueError, match="work must have .* entries by its header, got"):
        read_work(dataclasses.replace(plan, work=plan.work[:-1]))
