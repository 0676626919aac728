"""A sequence's output is bitwise the same alone, in any batch, on any pages, in any chunks of rows and threads."""

import dataclasses
import itertools

import pytest
import torch

import pagedkv
from pagedkv.testing.attention_batch import attention_batch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Decode and prefill, many and few rows, lengths around the boundaries of the kernel's chunks of keys.
SETTINGS = {
    "f32": {},
    "bf16-G4-D128": {"dtype": BF16, "group": 4, "head_dim": 128},
    "f16-G3-D40-HND": {"dtype": F16, "group": 3, "head_dim": 40, "value_dim": 24, "layout": "HND"},
    "G1-P1-window": {"group": 1, "page_size": 1, "window_left": 70},
    "G12-soft-cap": {"group": 12, "num_kv_heads": 1, "soft_cap": 2.0},
    "lut": {"softmax": "lut"},
    "alibi-sinks": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.01]), "sinks": torch.ones(4)},
}
Q_LENS, KV_LENS = [1, 70, 3, 1, 12], [600, 300, 256, 1, 513]


@pytest.fixture(params=SETTINGS)
def batch(request):
    return attention_batch(Q_LENS, KV_LENS, **SETTINGS[request.param])


def part_of(batch, sequence, first=0, last=None):
    """Rows [first, last) of one sequence as a batch of their own, as if the later rows were not there yet."""
    starts = batch.plan.query_indptr.tolist()
    start, stop = starts[sequence : sequence + 2]
    last = stop - start if last is None else last
    kv_len = KV_LENS[sequence] - (stop - start) + last
    first_page, last_page = batch.table.indptr[sequence : sequence + 2].tolist()
    pages = batch.table.indices[first_page:last_page].tolist()
    table = pagedkv.PageTable.from_rows([pages], [kv_len], batch.table.page_size)
    plan = dataclasses.replace(
        batch.plan,
        query_indptr=torch.tensor([0, last - first], dtype=torch.int32),
        page_indptr=table.indptr,
        page_indices=table.indices,
        seq_lens=table.seq_lens,
        num_tokens=last - first,
        work=None,
    )
    rows = slice(start + first, start + last)
    return rows, dataclasses.replace(batch, query=batch.query[rows], table=table, plan=plan)


def assert_same(part, whole, rows):
    assert torch.equal(part.out, whole.out[rows])
    assert torch.equal(part.lse, whole.lse[rows])


def test_alone_as_in_the_batch(batch):
    whole = batch.run(backend="cpu")
    for sequence in range(len(Q_LENS)):
        rows, alone = part_of(batch, sequence)
        assert_same(alone.run(backend="cpu"), whole, rows)


@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 70), (0, 8, 9, 41, 70), (0, 35, 70), tuple(range(60, 71))])
def test_in_any_chunks_of_rows(batch, cuts):
    whole = batch.run(backend="cpu")
    for first, last in itertools.pairwise(cuts):
        rows, chunk = part_of(batch, 1, first, last)
        assert_same(chunk.run(backend="cpu"), whole, rows)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_with_any_number_of_threads(batch, num_threads):
    torch.set_num_threads(2)
    whole = batch.run(backend="cpu")
    torch.set_num_threads(num_threads)
    assert_same(batch.run(backend="cpu"), whole, slice(None))
    rows, alone = part_of(batch, 0)
    assert_same(alone.run(backend="cpu"), whole, rows)


def test_on_any_pages_in_either_layout(batch):
    whole = batch.run(backend="cpu")
    order = torch.randperm(batch.key_pages.shape[0])
    moved = torch.empty_like(order)
    moved[order] = torch.arange(order.shape[0])
    indices = moved[batch.table.indices.long()].int()
    plan = dataclasses.replace(batch.plan, page_indices=indices, max_page=int(indices.max()), work=None)
    pages = [pages[order].transpose(1, 2).contiguous() for pages in (batch.key_pages, batch.value_pages)]
    layout = "HND" if batch.layout == "NHD" else "NHD"
    other = dataclasses.replace(batch, key_pages=pages[0], value_pages=pages[1], plan=plan, layout=layout)
    assert_same(other.run(backend="cpu"), whole, slice(None))


def test_in_pages_of_any_size(batch):
    whole = batch.run(backend="cpu")
    slots = batch.table.slot_mapping(torch.tensor([0, *KV_LENS], dtype=torch.int32).cumsum(0, dtype=torch.int32))
    key, value = pagedkv.gather_kv(batch.key_pages, batch.value_pages, slots, layout=batch.layout)
    # One page that holds all tokens of all sequences would need one table a sequence; pages of one token serve any.
    rows = torch.arange(sum(KV_LENS)).split(KV_LENS)
    table = pagedkv.PageTable.from_rows([row.tolist() for row in rows], KV_LENS, 1)
    plan = dataclasses.replace(
        batch.plan,
        page_indptr=table.indptr,
        page_indices=table.indices,
        page_size=1,
        max_page=table.max_page,
        work=None,
    )
    other = dataclasses.replace(
        batch, key_pages=key[:, None], value_pages=value[:, None], plan=plan, table=table, layout="NHD"
    )
    assert_same(other.run(backend="cpu"), whole, slice(None))
