"""TileDecoder: transformers' beam search over tiles that beams share, and caches that are empty again afterwards."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch

from pagedkv.engine import Engine, SamplingParams
from pagedkv.engine.tile_decoder import TileDecoder
from pagedkv.errors import OutOfPagesError
from pagedkv.integrations.transformers import UnsupportedModelError, check_model
from pagedkv.testing.beams import expected_beams, other_defaults, prompt_of
from pagedkv.testing.numeric import assert_close_to_oracle
from pagedkv.testing.tiny_models import VOCAB_SIZE, tiny_model

NAMES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gemma3n", "gpt2", "opt"]


@functools.cache
def model_of(name):
    """One model of a kind for all tests that leave it as it is."""
    return tiny_model(name)


def exact_score(model, prompt, token_ids, length_penalty):
    """The score of a continuation by the model in float64, without a cache."""
    text = torch.cat([prompt, torch.tensor(token_ids)])
    with torch.inference_mode():
        logits = model(input_ids=text[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(token_ids)[:, None])
    return float(chosen.sum()) / len(token_ids) ** length_penalty


def assert_empty(decoder):
    for cache in decoder.caches.values():
        cache.check()
        assert len(cache) == 0
        assert cache.stats().num_pinned == 0


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_scores_are_those_of_transformers(name):
    """Prompts of one token and around the borders of tiles; the caches serve one prompt after another."""
    model, exact_model = model_of(name), copy.deepcopy(model_of(name)).double()
    ours, theirs, exact = [], [], []
    for num_beams, tile_size, prompts in (
        (2, 4, ((1, 2.0),)),
        (3, 16, ((16, 0.0), (17, 1.0))),
        (5, 4, ((15, -1.0),)),
    ):
        decoder = TileDecoder(model, num_beams, max_tokens=48, tile_size=tile_size)
        for num_tokens, penalty in prompts:
            prompt = prompt_of(num_tokens, num_beams)
            options = {"max_new_tokens": 6, "length_penalty": penalty, "num_return_sequences": num_beams}
            found, expected = decoder.generate(prompt, **options), expected_beams(model, prompt, num_beams, **options)
            assert [hypothesis.token_ids for hypothesis in found] == expected.token_ids
            ours += [hypothesis.score for hypothesis in found]
            theirs += expected.scores
            exact += [exact_score(exact_model, prompt, token_ids, penalty) for token_ids in expected.token_ids]
            assert_empty(decoder)
    assert_close_to_oracle(
        "scores", torch.tensor(ours), torch.tensor(exact).double(), torch.tensor(theirs, dtype=torch.float32)
    )


@pytest.mark.parametrize(
    ("penalty", "stopping"), [(0.0, True), (1.0, False), (-1.0, "never"), (1.0, "never"), (2.0, True)]
)
def test_eos_ends_beams_as_in_transformers(penalty, stopping):
    lengths = set()
    for seed, (name, places) in enumerate((("llama", (2,)), ("gemma2", (1, 5)), ("llama", (3, 4)))):
        model, prompt, num_beams = model_of(name), prompt_of(6 + seed, seed), 2 + seed
        decoder = TileDecoder(model, num_beams, max_tokens=24, tile_size=4)
        likely = decoder.generate(prompt, max_new_tokens=10)[0].token_ids
        options = {
            "eos_token_ids": tuple({likely[place] for place in places}),
            "max_new_tokens": 10,
            "length_penalty": penalty,
            "early_stopping": stopping,
            "num_return_sequences": num_beams - 1,
        }
        found = [hypothesis.token_ids for hypothesis in decoder.generate(prompt, **options)]
        assert found == expected_beams(model, prompt, num_beams, **options).token_ids
        assert_empty(decoder)
        lengths |= {len(token_ids) for token_ids in found}
    # Ended by an EOS, but where the penalty lets all others win.
    assert penalty > 1 or min(lengths) < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["gemma2", "gemma3n"])
def test_beams_over_rounded_tiles_are_those_over_a_rounded_cache(name, dtype):
    model = model_of(name)
    decoder = TileDecoder(model, 3, max_tokens=32, tile_size=4, dtype=dtype)
    for num_tokens in (3, 12):
        prompt = prompt_of(num_tokens, num_tokens)
        found = decoder.generate(prompt, max_new_tokens=6, num_return_sequences=3)
        expected = expected_beams(model, prompt, 3, kv_dtype=dtype, max_new_tokens=6, num_return_sequences=3)
        assert [hypothesis.token_ids for hypothesis in found] == expected.token_ids
    assert_empty(decoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3n"])
def test_default_device_and_dtype_of_the_caller_do_not_matter(name, dtype):
    model, options = model_of(name), {"max_new_tokens": 4, "num_return_sequences": 2}
    decoder = TileDecoder(model, 2, max_tokens=16, tile_size=4, dtype=dtype)
    found, geometry = decoder.generate([1, 2, 3], **options), check_model(model)
    with other_defaults():
        assert check_model(model) == geometry
        assert decoder.generate([1, 2, 3], **options) == found
        inside = TileDecoder(model, 2, max_tokens=16, tile_size=4, dtype=dtype)
        assert inside.generate([1, 2, 3], **options) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_one_beam_is_greedy_over_pages_of_the_same_dtype(dtype):
    model = model_of("llama")
    decoder = TileDecoder(model, 1, max_tokens=40, tile_size=8, dtype=dtype)
    engine = Engine(model, num_pages=8, kv_dtype=dtype)
    prompts = [prompt_of(num_tokens, 5).tolist() for num_tokens in (1, 16, 17)]
    for prompt, greedy in zip(prompts, engine.generate(prompts, SamplingParams(max_new_tokens=10)), strict=True):
        assert list(decoder.generate(prompt, max_new_tokens=10)[0].token_ids) == list(greedy.token_ids)


def test_one_beam_is_greedy_of_transformers():
    model, prompt = model_of("llama"), prompt_of(7, 3)
    found = TileDecoder(model, 1, max_tokens=40, tile_size=4).generate(prompt, max_new_tokens=12)
    assert [found[0].token_ids] == expected_beams(model, prompt, 1, max_new_tokens=12).token_ids


def test_eos_of_the_generation_config_is_the_default():
    model, prompt = tiny_model("llama"), prompt_of(7, 3)
    decoder = TileDecoder(model, 2, max_tokens=40)
    likely = decoder.generate(prompt, max_new_tokens=8)[0].token_ids
    model.generation_config.eos_token_id = [likely[2], likely[4]]
    with_default = TileDecoder(model, 2, max_tokens=40).generate(prompt, max_new_tokens=8)
    assert with_default == decoder.generate(prompt, max_new_tokens=8, eos_token_ids=[likely[2], likely[4]])
    assert with_default[0].token_ids[-1] in (likely[2], likely[4])
    ignored = TileDecoder(model, 2, max_tokens=40).generate(prompt, max_new_tokens=8, eos_token_ids=())
    assert ignored[0].token_ids == likely


def test_more_beams_than_tokens():
    """Not all beams come from the first then: each of them must have the prompt."""
    model = tiny_model("llama", vocab_size=3, bos_token_id=0, pad_token_id=0)
    decoder = TileDecoder(model, 5, max_tokens=16, tile_size=4)
    options = {"max_new_tokens": 4, "num_return_sequences": 5}
    found = [hypothesis.token_ids for hypothesis in decoder.generate([1, 0, 2, 1, 1], **options)]
    assert found == expected_beams(model, torch.tensor([1, 0, 2, 1, 1]), 5, **options).token_ids


class EachStep:
    """Calls something before every forward pass of the model."""

    def __init__(self, model, call):
        self.handle = model.register_forward_pre_hook(lambda *_: call())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


def test_beams_share_the_prompt_and_the_books_agree_in_every_step():
    model = model_of("llama")
    decoder = TileDecoder(model, 4, max_tokens=64, tile_size=4)
    num_pages = []

    def look():
        for cache in decoder.caches.values():
            cache.check()
        num_pages.append([len(cache) for cache in decoder.caches.values()])

    with EachStep(model, look):
        decoder.generate(prompt_of(32, 0), max_new_tokens=14)
    assert len(num_pages) == 14
    assert num_pages[:2] == [[0, 0], [16, 16]]  # 8 tiles of 2 heads, shared by all
    # At most: those, and for each beam one new tile of each head every 4 tokens.
    for num_stored, counts in enumerate(num_pages[1:]):
        assert max(counts) <= 16 + 2 * 4 * -(-num_stored // 4)


def test_fewest_pages_that_do():
    """Beams that have nothing but the full tiles of the prompt in common need a page a beam, head and further tile."""
    model, prompt = model_of("llama"), prompt_of(9, 1)
    enough = TileDecoder(model, 2, max_tokens=15, tile_size=4, num_pages=2 * (2 + 2 * 2))
    options = {"max_new_tokens": 6, "num_return_sequences": 2}
    found = [hypothesis.token_ids for hypothesis in enough.generate(prompt, **options)]
    assert found == expected_beams(model, prompt, 2, **options).token_ids


@pytest.mark.parametrize(("num_pages", "num_passes"), [(5, 1), (6, 2), (7, 2)])
def test_too_few_pages_raise_and_leave_nothing(num_pages, num_passes):
    """In the prefill of 3 tiles of 2 heads, and in the first step, in which 2 beams part in the third of them."""
    model, prompt = model_of("llama"), prompt_of(9, 1)
    decoder = TileDecoder(model, 2, max_tokens=40, tile_size=4, num_pages=num_pages)
    passes = []
    with EachStep(model, lambda: passes.append(1)), pytest.raises(OutOfPagesError, match="cannot allocate"):
        decoder.generate(prompt, max_new_tokens=9)
    assert len(passes) == num_passes
    assert_empty(decoder)
    found = decoder.generate(prompt[:2], max_new_tokens=2)
    assert [found[0].token_ids] == expected_beams(model, prompt[:2], 2, max_new_tokens=2).token_ids


@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt("planted")], ids=repr)
def test_failing_model_leaves_nothing(error):
    model, prompt = model_of("llama"), prompt_of(9, 1)
    decoder = TileDecoder(model, 3, max_tokens=40, tile_size=4)
    expected = decoder.generate(prompt, max_new_tokens=6)
    calls = itertools.count()

    def fail(*_):
        if next(calls) == 3:
            raise error

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(type(error), match="planted"):
        decoder.generate(prompt, max_new_tokens=6)
    handle.remove()
    assert_empty(decoder)
    assert decoder.generate(prompt, max_new_tokens=6) == expected


def test_broken_logits_leave_nothing():
    model = tiny_model("llama")
    decoder = TileDecoder(model, 3, max_tokens=40)
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(FloatingPointError, match="logits of beam 0 must have a finite maximum, got nan"):
        decoder.generate([1, 2, 3], max_new_tokens=6)
    assert_empty(decoder)


def test_longest_answer_fits():
    model = model_of("llama")
    decoder = TileDecoder(model, 2, max_tokens=9, tile_size=4)
    found = decoder.generate(prompt_of(8, 0), max_new_tokens=1)
    assert [found[0].token_ids] == expected_beams(model, prompt_of(8, 0), 2, max_new_tokens=1).token_ids
    with pytest.raises(ValueError, match=r"at most 9 tokens together \(max_tokens\), got 8 and 2"):
        decoder.generate(prompt_of(8, 0), max_new_tokens=2)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ([], {}, ValueError, "prompt must have at least one token"),
        ([VOCAB_SIZE], {}, ValueError, "prompt must have token ids in 0..257"),
        ([1.5], {}, TypeError, "prompt must be text, token ids"),
        ([1], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ([1], {"num_return_sequences": 3}, ValueError, "num_return_sequences must be at most 2"),
        ([1], {"eos_token_ids": 5}, TypeError, "eos_token_ids must be several ints, got int"),
        ([1] * 100, {"max_new_tokens": np.int8(100)}, ValueError, r"\(max_tokens\), got 100 and 100"),
        ([1], {"early_stopping": "soon"}, ValueError, "early_stopping must be"),
    ],
)
def test_generate_refuses_before_it_computes(prompt, options, error, words):
    model = model_of("llama")
    decoder = TileDecoder(model, 2, max_tokens=16)
    passes = []
    with EachStep(model, lambda: passes.append(1)), pytest.raises(error, match=words):
        decoder.generate(prompt, **{"max_new_tokens": 4, **options})
    assert passes == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
        ({"max_tokens": 1}, ValueError, "max_tokens must be at least 2"),
        ({"max_tokens": 257}, ValueError, r"max_tokens must be at most 256 \(the model's context\), got 257"),
        ({"tile_size": 0}, ValueError, "tile_size must be at least 1"),
        ({"num_pages": 0}, ValueError, "num_pages must be at least 1"),
        ({"num_pages": 4.0}, TypeError, "num_pages must be an int"),
        ({"backend": "none"}, ValueError, "backend must be 'auto' or .*'reference'.*, got 'none'"),
        ({"dtype": torch.float8_e5m2}, ValueError, "dtype of tiles must be float32"),
    ],
)
def test_decoder_refuses(options, error, words):
    with pytest.raises(error, match=words):
        TileDecoder(model_of("llama"), **{"num_beams": 2, "max_tokens": 16, **options})


def test_decoder_refuses_models_that_tiles_cannot_run():
    with pytest.raises(UnsupportedModelError, match="layer 0 needs attention sinks, which tiles do not have"):
        TileDecoder(model_of("gpt_oss"), 2, max_tokens=16)
    double = copy.deepcopy(model_of("llama")).double()
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM computes attention in float64, which no back"):
        TileDecoder(double, 2, max_tokens=16)
