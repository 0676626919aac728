"""PagedStep: what it refuses before anything is written, where tokens stand, and how it reads what it stored."""

import pytest
import torch

from pagedkv import KVPool, PageTable, plan_attention
from pagedkv.integrations.transformers import PagedModel, PagedStep
from pagedkv.testing.numeric import assert_close_to_oracle, attention_oracle
from pagedkv.testing.poison import poison_unused
from pagedkv.testing.rounded_cache import rounded
from pagedkv.testing.tiny_models import tiny_model

QUANTISED = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


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


class CheckedStep(PagedStep):
    """Compares each layer's attention with float64 over what the codes and scales in the pool stand for."""

    def attend(self, call):
        out = super().attend(call)
        layer, pool, arguments = self.geometry.layers[call.layer_idx], self.pool, call.arguments
        plan = plan_attention(
            self.query_indptr,
            self.table,
            num_q_heads=layer.num_q_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            value_dim=layer.value_dim,
            window_left=-1 if layer.window is None else layer.window - 1,
        )
        exact, plain = (
            attention_oracle(
                call.query[0].transpose(0, 1),
                pool.key_pages(layer.stored_in),
                pool.value_pages(layer.stored_in),
                plan,
                layout=pool.spec.layout,
                sm_scale=arguments.sm_scale,
                soft_cap=arguments.soft_cap,
                sinks=arguments.sinks,
                key_scales=pool.key_scales(layer.stored_in),
                value_scales=pool.value_scales(layer.stored_in),
                arithmetic=arithmetic,
            )
            for arithmetic in (torch.float64, torch.float32)
        )
        assert_close_to_oracle("out", out[0], exact.out, plain.out)
        return out


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3n", "gpt_oss"])
@pytest.mark.parametrize(("layout", "order"), [("NHD", "layer_first"), ("HND", "page_first")])
def test_step_attends_over_what_quantised_pages_stand_for(name, dtype, layout, order):
    """Prefill of two sequences, then a step that mixes decoding with a chunk; soft caps, sinks and windows included."""
    paged = PagedModel(tiny_model(name))
    pool = KVPool(paged.spec(4, dtype, layout=layout, order=order), 12)
    rows = [[3, 1, 10, 6], [5, 0, 7, 11]]
    for seq_lens, starts in (([13, 4], [0, 13, 17]), ([14, 9], [0, 1, 6])):
        table = PageTable.from_rows(rows, seq_lens, 4)
        poison_unused(pool, table)
        step = CheckedStep(pool, paged.geometry, table, indptr(*starts))
        logits = paged.forward(torch.randint(250, (starts[-1],)), step)
        assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *QUANTISED], ids=str)
@pytest.mark.parametrize("of_model", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_step_stores_in_the_dtype_of_the_pool_and_gives_states_back_as_they_came(paged, dtype, of_model):
    pool = KVPool(paged.spec(4, dtype), 8)
    step = PagedStep(pool, paged.geometry, PageTable.from_rows([[3, 1]], [6], 4), indptr(0, 5))
    key, value = (3 * torch.randn(2, 1, 2, 5, 8)).to(of_model)
    given = step.update(key, value, 1)
    assert given[0] is key
    assert given[1] is value
    for stored, states in zip(pool.gather(1, step.slot_mapping), (key, value), strict=True):
        assert torch.equal(stored.to(of_model).transpose(0, 1)[None], rounded(states, dtype))


def test_step_stores_states_with_a_strided_last_dim(paged, pool):
    step = PagedStep(pool, paged.geometry, PageTable.from_rows([[3]], [3], 4), indptr(0, 3))
    key, value = torch.randn(2, 1, 2, 8, 3).transpose(3, 4)
    step.update(key, value, 0)
    assert torch.equal(pool.gather(0, step.slot_mapping)[1].transpose(0, 1)[None], value)
