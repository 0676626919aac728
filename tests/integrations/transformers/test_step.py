"""PagedStep: what it refuses before anything is written, and where tokens stand."""

import pytest
import torch

from pagedkv import KVPool, PageTable
from pagedkv.integrations.transformers import PagedModel, PagedStep
from pagedkv.testing.tiny_models import tiny_model


@pytest.fixture(scope="module")
def paged():
    return PagedModel(tiny_model("llama"))


@pytest.fixture
def pool(paged):
    pool = KVPool(paged.spec(4), 8)
    pool.buffer.fill_(torch.nan)
    return pool


def indptr(*starts):
    return torch.tensor(starts, dtype=torch.int32)


def test_step_positions_and_slots(paged, pool):
    table = PageTable.from_rows([[3, 1], [5]], [6, 3], 4)
    step = PagedStep(pool, paged.geometry, table, indptr(0, 2, 5))
    assert step.position_ids.tolist() == [4, 5, 0, 1, 2]
    assert step.slot_mapping.tolist() == [4, 5, 20, 21, 22]
    assert step.last_rows().tolist() == [1, 4]
    assert step.num_tokens == 5


def test_step_writes_only_its_slots(paged, pool):
    table = PageTable.from_rows([[3, 1]], [6], 4)
    step = PagedStep(pool, paged.geometry, table, indptr(0, 6))
    paged.forward(torch.arange(6), step)
    for layer in range(2):
        for pages in (pool.key_pages(layer), pool.value_pages(layer)):
            written = ~pages.isnan().all(dim=-1).all(dim=-1)
            assert written.nonzero().tolist() == [[1, 0], [1, 1], [3, 0], [3, 1], [3, 2], [3, 3]]


@pytest.mark.parametrize(
    ("rows", "lens", "page_size", "starts", "slots", "words"),
    [
        ([[0]], [3], 8, [0, 3], None, "page_size 4"),
        ([[8]], [3], 4, [0, 3], None, "must be below 8"),
        ([[0]], [3], 4, [0, 4], torch.arange(4), "between 0 and its length"),
        ([[0]], [3], 4, [0, 1, 3], torch.arange(3), r"shape \[S \+ 1\]"),
        ([[0]], [3], 4, [0, 3], torch.arange(2), r"slot_mapping must have shape \[T\] with T = 3"),
    ],
)
def test_step_refuses(paged, pool, rows, lens, page_size, starts, slots, words):
    table = PageTable.from_rows(rows, lens, page_size)
    with pytest.raises(ValueError, match=words):
        PagedStep(pool, paged.geometry, table, indptr(*starts), slots)


def test_step_refuses_slots_of_another_dtype(paged, pool):
    table = PageTable.from_rows([[0]], [3], 4)
    with pytest.raises(TypeError, match="slot_mapping must have dtype int64"):
        PagedStep(pool, paged.geometry, table, indptr(0, 3), torch.arange(3, dtype=torch.int32))


def test_step_refuses_a_batch_that_is_not_packed(paged, pool):
    table = PageTable.from_rows([[0]], [3], 4)
    step = PagedStep(pool, paged.geometry, table, indptr(0, 3))
    with pytest.raises(ValueError, match="packed into one row, got a batch of 2"):
        step.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
    assert pool.buffer.isnan().all()
