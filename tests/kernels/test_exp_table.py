"""The table of exponentials: its bound, its ends, and a softmax made of it."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import pagedkv
from pagedkv import ExpTable
from pagedkv.testing.attention_batch import attention_batch
from pagedkv.testing.numeric import assert_attention_close

TABLES = [
    ExpTable(),
    ExpTable(2, 0.01),
    ExpTable(100, 3.3),
    ExpTable(4096, 104.0),
    ExpTable(1025, 16),
    ExpTable(3, 1.0),
]
# e^x is a normal float32 from here on.
LOWEST = -87.0


def distances(table):
    """Points all over, on the entries, between them, and on both sides of the ends of the table."""
    step = table.max_distance / table.num_steps
    entries = -step * torch.arange(table.num_entries)
    ends = -table.max_distance * torch.arange(5)
    beside = torch.cat([entries, ends])
    near = torch.cat([beside, beside.nextafter(torch.tensor(0.0)), beside.nextafter(torch.tensor(-math.inf))])
    points = torch.cat([near, entries - step / 2, LOWEST * torch.rand(50_000), torch.linspace(LOWEST, 0, 50_000)])
    return points[(points >= LOWEST) & (points <= 0)]


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_error_is_within_the_bound(table):
    x = distances(table)
    exact = torch.exp(x.double())
    error = (table.exp(x).double() / exact - 1).abs().max()
    assert float(error) <= table.max_relative_error


def test_default_is_a_tenth_of_a_thousandth():
    assert ExpTable().max_relative_error < 1e-4
    assert (ExpTable().num_entries, ExpTable().max_distance) == (1024, 10.0)


def test_bound_is_not_generous():
    # The middle of the first interval is where the interpolation is off most.
    table = ExpTable(11, 1.0)
    error = table.exp(torch.tensor([-0.05])).double() / math.exp(-0.05) - 1
    assert float(error) > table.max_relative_error / 2


def test_ends():
    x = torch.tensor([0.0, -0.0, -104.0, -1e30, -math.inf, math.nan])
    result = ExpTable().exp(x)
    assert result[:5].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert result[5].isnan()
    assert ExpTable().exp(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((1, 10.0), ValueError, "num_entries must be at least 2, got 1"),
        ((2**20 + 1, 10.0), ValueError, "num_entries must be at most 1048576"),
        ((10.0, 10.0), TypeError, "num_entries must be an int, got float"),
        ((16, 0.0), ValueError, "max_distance must be from 0.0009765625 to 104, got 0.0"),
        ((16, -1.0), ValueError, "max_distance must be from"),
        ((16, 105.0), ValueError, "max_distance must be from"),
        ((16, math.nan), ValueError, "max_distance must be a finite float32"),
        ((16, "10"), TypeError, "max_distance must be a number, got str"),
    ],
)
def test_what_makes_no_table(arguments, error, words):
    with pytest.raises(error, match=words):
        ExpTable(*arguments)


@pytest.mark.parametrize("table", [ExpTable(2, 27.0), ExpTable(2, 69.29056), ExpTable(2, 104.0)], ids=str)
def test_coarse_tables_vanish_where_the_exponential_does(table, any_backend):
    assert table.exp(torch.tensor([-104.1, -120.0, -1e5])).tolist() == [0.0, 0.0, 0.0]
    # Two keys, the logit of one 105 below the other's: its value must not show.
    pages = torch.zeros(1, 2, 1, 8)
    pages[0, 1, 0, 0] = -105.0
    values = torch.zeros(1, 2, 1, 8)
    values[0, 1] = 1e30
    table_of_pages = pagedkv.PageTable.from_rows([[0]], [2], 2)
    plan = pagedkv.plan_attention(
        torch.tensor([0, 1], dtype=torch.int32), table_of_pages, num_q_heads=1, num_kv_heads=1, head_dim=8
    )
    query = torch.zeros(1, 1, 8)
    query[..., 0] = 1.0
    out = pagedkv.paged_attention(query, pages, values, plan, sm_scale=1.0, softmax=table, backend=any_backend)
    assert torch.equal(out, torch.zeros(1, 1, 8))


@pytest.mark.parametrize("number", [np.float16(10), np.float32(10), np.float64(10), np.int64(10), 10, Fraction(10)])
def test_any_number_makes_the_same_table(number):
    table = ExpTable(1024, number)
    assert table == ExpTable()
    assert type(table.max_distance) is float
    x = torch.linspace(-20, 0, 1000)
    assert torch.equal(table.exp(x), ExpTable().exp(x))


def use_in_a_transform(table):
    torch.func.grad(lambda x: table.exp(x).sum())(torch.tensor([-1.0, -2.0]))


def use_in_an_export(table):
    class Module(torch.nn.Module):
        def forward(self, x):
            return table.exp(x)

    torch.export.export(Module(), (torch.tensor([-1.0, -2.0]),))


def use_of_fake_tensors(table):
    with torch._subclasses.FakeTensorMode():
        table.exp(torch.zeros(3))


def use_on_a_default_device(table):
    with torch.device("meta"):
        table.exp(torch.zeros(3, device="cpu"))


def use_in_inference_mode(table):
    with torch.inference_mode():
        table.exp(torch.zeros(3))


FIRST_USES = [
    use_in_a_transform,
    use_in_an_export,
    use_of_fake_tensors,
    use_on_a_default_device,
    use_in_inference_mode,
]


@pytest.mark.parametrize("nth, use", list(enumerate(FIRST_USES)), ids=[use.__name__ for use in FIRST_USES])
def test_first_use_in_any_mode_leaves_a_table_for_all_others(nth, use, any_backend):
    table = ExpTable(50 + nth, 4.0 + len(any_backend))  # of no other test
    use(table)
    x = torch.linspace(-9, 0, 100)
    error = (table.exp(x).double() / torch.exp(x.double()) - 1).abs().max()
    assert 0 < float(error) <= table.max_relative_error
    batch = attention_batch([1], [40])
    arguments = batch.query, batch.key_pages, batch.value_pages, batch.plan
    assert_attention_close(batch.run(backend=any_backend, softmax=table), *arguments, softmax=table)


def test_integers_have_no_exponential():
    with pytest.raises(TypeError, match="x must have dtype"):
        ExpTable().exp(torch.tensor([-1]))


@pytest.mark.parametrize("table", ["lut", *TABLES[1:]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_attention_by_a_table(any_backend, table, dtype):
    # Logits up to a few hundred apart: far beyond the end of every table.
    batch = attention_batch([1, 70, 3], [600, 300, 257], dtype=dtype, sm_scale=2.0)
    arguments = batch.query, batch.key_pages, batch.value_pages, batch.plan
    state = batch.run(backend=any_backend, softmax=table)
    assert_attention_close(state, *arguments, **batch.options, softmax=table)


@pytest.mark.parametrize("num_masked", [0, 1_000, 32_767])
def test_masked_keys_weigh_exactly_nothing(any_backend, num_masked):
    # One key with value 1 among masked ones of value 0: a floor under their weights would take from it.
    kv_len = num_masked + 1
    mask = torch.zeros(kv_len, dtype=torch.bool)
    mask[kv_len // 2] = True
    table = pagedkv.PageTable.from_rows([range(-(-kv_len // 64))], [kv_len], 64)
    plan = pagedkv.plan_attention(
        torch.tensor([0, 1], dtype=torch.int32), table, num_q_heads=1, num_kv_heads=1, head_dim=8, custom_mask=mask
    )
    pages = torch.randn(len(table.indices), 64, 1, 8)
    values = torch.zeros_like(pages)
    values.view(-1, 8)[kv_len // 2] = 1.0
    state = pagedkv.paged_attention(
        torch.randn(1, 1, 8), pages, values, plan, softmax="lut", return_lse=True, backend=any_backend
    )
    assert torch.equal(state.out, torch.ones(1, 1, 8))
    assert state.lse.isfinite().all()


def test_weights_sum_to_one(any_backend):
    # All values 1: the result is the sum of the weights, which is 1 within the rounding of sum and quotient.
    batch = attention_batch([1, 5], [600, 40])
    value_pages = torch.ones_like(batch.value_pages)
    state = pagedkv.paged_attention(
        batch.query, batch.key_pages, value_pages, batch.plan, softmax="lut", return_lse=True, backend=any_backend
    )
    assert float((state.out - 1).abs().max()) <= 600 * torch.finfo(torch.float32).eps


def test_rows_without_keys_and_far_keys(any_backend):
    batch = attention_batch([3, 1], [1, 0], softmax="lut")
    state = batch.run(backend=any_backend)
    assert torch.equal(state.out[:2], torch.zeros(2, 4, 64))
    assert bool((state.lse[[0, 1, 3]] == -math.inf).all())


def test_nan_and_infinite_logits_read_as_with_the_exact_softmax(any_backend):
    batch = attention_batch([1, 1, 1], [20, 20, 20], head_dim=8)
    batch.query[0], batch.query[1] = math.nan, math.inf
    exact, by_table = (batch.run(backend=any_backend, softmax=softmax) for softmax in ("exact", "lut"))
    assert torch.equal(exact.out.isnan(), by_table.out.isnan())
    assert bool(by_table.out[0].isnan().all())
    assert bool(by_table.out[2].isfinite().all())
