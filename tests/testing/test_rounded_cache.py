"""The cache that loses what a dtype loses: by hand on a few numbers, and nothing in its own dtype."""

import pytest
import torch
import transformers

from pagedkv.testing.rounded_cache import RoundedCache, rounded
from pagedkv.testing.tiny_models import tiny_model

STATES = torch.tensor([[[[0.5, -2.0, 4.0]], [[0.0, 0.0, 0.0]]]])  # one row, two heads, one token


def test_rounded_by_hand():
    step = torch.tensor(4.0) / 127
    assert torch.equal(rounded(STATES, torch.int8)[0, 0, 0], torch.tensor([16.0, -64.0, 127.0]) * step)
    # 4 becomes 448, the largest of float8; 224 and 56 are among its numbers, too.
    of_float8 = torch.tensor([56.0, -224.0, 448.0]) * (torch.tensor(4.0) / 448)
    assert torch.equal(rounded(STATES, torch.float8_e4m3fn)[0, 0, 0], of_float8)
    assert torch.equal(rounded(torch.tensor([1.1, 1.4]), torch.float8_e5m2), torch.tensor([1.0, 1.5]))
    assert torch.equal(rounded(torch.tensor([1 + 2**-9]), torch.bfloat16), torch.tensor([1.0]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_a_row_of_zeros_stays_one(dtype):
    assert torch.equal(rounded(STATES, dtype)[0, 1], torch.zeros(1, 3))


@pytest.mark.parametrize("of_model", [torch.float64, torch.float16])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_rounded_keeps_the_dtype_of_the_model(dtype, of_model):
    states = rounded(STATES.to(of_model), dtype)
    assert states.dtype == of_model
    assert torch.equal(states, rounded(STATES, dtype).to(of_model))


def test_cache_of_the_models_own_dtype_changes_nothing():
    model, ids = tiny_model("mistral"), torch.arange(12)[None]
    with torch.inference_mode():
        ours, theirs = (
            model(ids, past_key_values=cache).logits
            for cache in (RoundedCache(model.config, torch.float32), transformers.DynamicCache(config=model.config))
        )
    assert torch.equal(ours, theirs)


def test_cache_keeps_what_it_returns():
    cache = RoundedCache(tiny_model("llama").config, torch.float8_e5m2)
    first, second = torch.randn(2, 1, 2, 3, 8)
    cache.update(first, second, 0)
    key, value = cache.update(second, first, 0)
    assert torch.equal(key, rounded(torch.cat([first, second], dim=2), torch.float8_e5m2))
    assert torch.equal(value, rounded(torch.cat([second, first], dim=2), torch.float8_e5m2))
