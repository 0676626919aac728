"""PagedCache in model.generate: the tokens of DynamicCache, whatever generate does to the cache."""

import copy

import pytest
import torch
import transformers

from pagedkv import OutOfPagesError
from pagedkv.integrations.transformers import PagedCache, UnsupportedModelError
from pagedkv.management import check_integrity
from pagedkv.testing.bits import same_bits
from pagedkv.testing.rounded_cache import RoundedCache
from pagedkv.testing.tiny_models import tiny_model

NUM_TOKENS = 12
OTHER_DTYPES = [torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


def padded(lengths):
    """Left-padded prompts and their mask."""
    width = max(lengths)
    ids = torch.full((len(lengths), width), 257)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(0, 250, (length,))
    return ids, (ids != 257).long()


def run(model, cache, ids, mask, **options):
    torch.manual_seed(11)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, past_key_values=cache, **{"do_sample": False, **options}
    )


def dynamic(model):
    return transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "gemma3n", "gpt_oss"])
def test_generate_left_padded_batch(name):
    model = tiny_model(name)
    ids, mask = padded([5, 13, 9])
    cache = PagedCache(model.config, num_pages=64, page_size=4)
    assert torch.equal(run(model, cache, ids, mask), run(model, dynamic(model), ids, mask))
    assert cache.get_seq_length() == 13 + NUM_TOKENS - 1
    assert cache.batch_size == 3
    check_integrity(cache.manager)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_generate_beams_and_samples(name, options):
    model = tiny_model(name)
    ids, mask = padded([5, 11])
    cache = PagedCache(model.config, num_pages=128, page_size=4)
    assert torch.equal(run(model, cache, ids, mask, **options), run(model, dynamic(model), ids, mask, **options))
    check_integrity(cache.manager)


def test_beams_share_pages():
    model = tiny_model("llama")
    ids, mask = padded([64])
    cache = PagedCache(model.config, num_pages=128, page_size=4)
    with torch.inference_mode():
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.batch_repeat_interleave(4)
    assert cache.batch_size == 4
    assert cache.manager.stats().owned == 16
    cache.reorder_cache(torch.tensor([2, 2, 0, 1]))
    assert cache.manager.stats().owned == 16
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    assert cache.batch_size == 2
    cache.batch_select_indices(torch.tensor([-1]))
    assert cache.batch_size == 1
    check_integrity(cache.manager)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("assistance", ["prompt_lookup", "model"])
def test_generate_assisted(name, assistance):
    """Rejected drafts are cropped; the rows continue as if they had never been."""
    model = tiny_model(name)
    ids = torch.arange(3, 9).repeat(3)[None]
    mask = torch.ones_like(ids)
    assistant = tiny_model(name, num_hidden_layers=1)
    options = {"prompt_lookup_num_tokens": 3} if assistance == "prompt_lookup" else {"assistant_model": assistant}
    cache = PagedCache(model.config, num_pages=64, page_size=4)
    assert torch.equal(run(model, cache, ids, mask, **options), run(model, dynamic(model), ids, mask))


def test_crop():
    model = tiny_model("llama")
    cache = PagedCache(model.config, num_pages=16, page_size=4)
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        expected = model(ids).logits[0, -1]
        model(torch.cat([ids[:, :-1], ids[:, :3]], dim=1), past_key_values=cache)
        cache.crop(-3)
        cache.crop(0)
        got = model(ids[:, -1:], past_key_values=cache).logits[0, -1]
    assert cache.get_seq_length() == 10
    assert cache.manager.stats().owned == 3
    assert int(got.argmax()) == int(expected.argmax())
    with pytest.raises(ValueError, match="tokens_to_remove must be 0 or negative, got 2"):
        cache.crop(2)
    with pytest.raises(ValueError, match="tokens_to_remove must be at least -10"):
        cache.crop(-11)


def test_reset_gives_pages_back_and_the_cache_serves_again():
    model = tiny_model("llama")
    cache = PagedCache(model.config, num_pages=16, page_size=4)
    cache.reset()
    ids, mask = padded([6, 4])
    first = run(model, cache, ids, mask)
    cache.reset()
    assert cache.manager.stats().free == 16
    assert torch.equal(run(model, cache, ids, mask), first)


def test_deepcopy_continues_a_shared_prompt():
    """The usual way to reuse a prompt: compute it once, copy the cache for each continuation."""
    model = tiny_model("llama")
    prompt = torch.arange(3, 13)[None]
    cache = PagedCache(model.config, num_pages=64, page_size=4)
    with torch.inference_mode():
        model(prompt, past_key_values=cache)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    assert cache.manager.stats().owned == 3
    for number, copied in enumerate(copies):
        ids = torch.cat([prompt, torch.tensor([[40 + number]])], dim=1)
        mask = torch.ones_like(ids)
        assert torch.equal(run(model, copied, ids, mask), run(model, dynamic(model), ids, mask))
    assert cache.get_seq_length() == 10
    del copies, copied
    assert cache.manager.stats().num_sequences == 1
    check_integrity(cache.manager)


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_pages_of_another_dtype(dtype):
    model = tiny_model("llama")
    cache = PagedCache(model.config, num_pages=16, page_size=4, dtype=dtype)
    with torch.inference_mode():
        logits = model(torch.arange(5)[None], past_key_values=cache).logits
    assert logits.dtype == torch.float32
    assert cache.manager.pool.spec.dtype == dtype


@pytest.mark.parametrize("of_model", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_update_gives_back_what_a_cache_of_that_dtype_would_keep(dtype, of_model):
    """Bit for bit, of all tokens, the new ones included; the second step begins inside a page."""
    config = tiny_model("llama").config
    paged, expected = PagedCache(config, num_pages=16, page_size=4, dtype=dtype), RoundedCache(config, dtype)
    for num_tokens in (5, 1, 6):
        states = (5 * torch.randn(2, 2, 2, num_tokens, 8)).to(of_model)  # K and V, rows, heads
        for layer in range(2):
            got, kept = paged.update(*states, layer), expected.update(*states, layer)
            for ours, theirs in zip(got, kept, strict=True):
                assert same_bits(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_over_pages_of_another_dtype(name, dtype, options):
    """Beams copy pages where they part: scales must come along."""
    model = tiny_model(name)
    ids, mask = padded([5, 13])
    cache = PagedCache(model.config, num_pages=128, page_size=4, dtype=dtype)
    expected = run(model, RoundedCache(model.config, dtype), ids, mask, **options)
    assert torch.equal(run(model, cache, ids, mask, **options), expected)
    assert not options or cache.manager.stats().copied_pages > 0
    check_integrity(cache.manager)


def test_states_with_a_strided_last_dim():
    cache = PagedCache(tiny_model("llama").config, num_pages=4)
    states = torch.randn(2, 1, 2, 8, 3).transpose(3, 4)
    for ours, given in zip(cache.update(*states, 0), states, strict=True):
        assert same_bits(ours, given)


def test_out_of_pages_stores_nothing():
    model = tiny_model("llama")
    cache = PagedCache(model.config, num_pages=5, page_size=4)
    with torch.inference_mode():
        model(torch.arange(8)[None].repeat(2, 1), past_key_values=cache)
        with pytest.raises(OutOfPagesError, match="cannot allocate 1 page: 0 free"):
            model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
    assert cache.get_seq_length() == 8
    assert cache.manager.stats().owned == 4
    check_integrity(cache.manager)


def test_cache_refuses_another_batch_and_other_layers():
    model = tiny_model("llama")
    cache = PagedCache(model.config, num_pages=16)
    with torch.inference_mode():
        model(torch.arange(4)[None], past_key_values=cache)
        with pytest.raises(ValueError, match="key_states must have a batch of 1"):
            model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
    config = transformers.Llama4TextConfig(num_hidden_layers=4)
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        PagedCache(config, num_pages=16)
