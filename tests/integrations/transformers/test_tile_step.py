"""TileStep: what it refuses before anything is written, where tokens stand, and how it reads what it stored."""

import copy

import pytest
import torch

from pagedkv.integrations.transformers import PagedModel, UnsupportedModelError, check_model
from pagedkv.integrations.transformers.adapter import using_attention
from pagedkv.integrations.transformers.tile_step import TileStep
from pagedkv.storage.tiles.tile_cache import TileCache
from pagedkv.testing.beams import other_defaults
from pagedkv.testing.bits import same_bits
from pagedkv.testing.numeric import assert_close_to_oracle
from pagedkv.testing.rounded_cache import rounded
from pagedkv.testing.tiny_models import tiny_model


@pytest.fixture(scope="module")
def paged():
    return PagedModel(tiny_model("llama"))


def caches_for(paged, num_beams=3, tile_size=4, num_tiles=6, dtype=torch.float32):
    caches = {}
    for index, layer in paged.geometry.layers.items():
        if layer.stored_in == index:
            caches[index] = TileCache(
                num_beams * layer.num_kv_heads * num_tiles,
                tile_size,
                layer.head_dim,
                num_beams=num_beams,
                num_heads=layer.num_kv_heads,
                num_tiles=num_tiles,
                value_dim=layer.value_dim,
                dtype=dtype,
            )
    return caches


def stored(cache, beam, part, num_tokens):
    """[Hk, num_tokens, D]: what the tiles of a beam hold, as numbers."""
    heads = []
    for head in range(cache.num_heads):
        tiles = [cache.get(beam, head, tile, part) for tile in range(-(-num_tokens // cache.geometry.tile_size))]
        if cache.geometry.has_scales:
            tiles = [codes.float() * scales[:, None] for codes, scales in tiles]
        heads.append(torch.cat(tiles)[:num_tokens])
    return torch.stack(heads)


def test_step_says_where_tokens_stand(paged):
    step = TileStep(caches_for(paged), paged.geometry, torch.tensor([4, 0]), 3, torch.tensor([2, 0]))
    assert step.position_ids.tolist() == [4, 5, 6, 0, 1, 2]
    assert step.last_rows().tolist() == [2, 5]
    assert (step.num_rows, step.num_new_tokens, step.num_tokens) == (2, 3, 6)


def test_step_takes_all_beams_by_default(paged):
    step = TileStep(caches_for(paged), paged.geometry, torch.tensor([4, 0, 9]), 1)
    assert step.beam_ids.tolist() == [0, 1, 2]
    assert step.last_rows().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("of_model", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_step_stores_in_the_dtype_of_the_tiles_and_gives_states_back_as_they_came(paged, dtype, of_model):
    caches = caches_for(paged, dtype=dtype)
    step = TileStep(caches, paged.geometry, torch.tensor([0, 0]), 5, torch.tensor([2, 0]))
    key, value = (3 * torch.randn(2, 1, 2, 10, 8)).to(of_model)
    given = step.update(key, value, 1)
    assert given[0] is key
    assert given[1] is value
    for part, states in (("k", key), ("v", value)):
        for row, beam in enumerate((2, 0)):
            of_beam = states[0, :, 5 * row : 5 * row + 5]
            assert torch.equal(stored(caches[1], beam, part, 5).to(of_model), rounded(of_beam, dtype))
    assert not caches[1].contains(1, 0, 0)
    assert len(caches[0]) == 0


def test_step_stores_states_with_a_strided_last_dim(paged):
    caches = caches_for(paged)
    key, value = torch.randn(2, 1, 2, 8, 3).transpose(3, 4)
    TileStep(caches, paged.geometry, torch.tensor([0]), 3, torch.tensor([1])).update(key, value, 0)
    assert torch.equal(stored(caches[0], 1, "v", 3), value[0])


def dense_logits(model, texts, dtype):
    """The logits of the last token of each text, by the model alone, without a cache."""
    model = copy.deepcopy(model).to(dtype)
    with torch.inference_mode():
        return torch.cat([model(input_ids=text[None], use_cache=False).logits[:, -1].double() for text in texts])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gemma3n", "gpt2", "opt"])
def test_steps_give_the_logits_of_the_model(name, any_backend):
    """Beams prefilled one by one to unlike lengths, then chunks of three and single tokens of all or some of them."""
    paged = PagedModel(tiny_model(name))
    caches = caches_for(paged)
    texts = torch.randint(256, (3, 24))
    lengths = [0, 0, 0]
    for beams, num_new in (([1], 7), ([0], 4), ([2], 13), ([2, 0, 1], 3), ([0, 1, 2], 1), ([1], 1), ([1, 0], 1)):
        first = torch.tensor([lengths[beam] for beam in beams])
        step = TileStep(caches, paged.geometry, first, num_new, torch.tensor(beams), backend=any_backend)
        ids = torch.cat([texts[beam, lengths[beam] : lengths[beam] + num_new] for beam in beams])
        logits = paged.forward(ids, step)
        for beam in beams:
            lengths[beam] += num_new
        seen = [texts[beam, : lengths[beam]] for beam in beams]
        exact, plain = (dense_logits(paged.model, seen, dtype) for dtype in (torch.float64, torch.float32))
        assert_close_to_oracle("logits", logits, exact, plain)
    for cache in caches.values():
        cache.check()
        assert cache.stats().num_pinned == 0


def test_step_reads_shared_tiles_and_writes_its_own(paged):
    caches = caches_for(paged)
    prompt = torch.randint(256, (6,))
    paged.forward(prompt, TileStep(caches, paged.geometry, torch.tensor([0]), 6, torch.tensor([0])))
    for cache in caches.values():
        cache.fork(0, 1)
        cache.fork(0, 2)
    tokens = torch.tensor([5, 6, 7])
    logits = paged.forward(tokens, TileStep(caches, paged.geometry, torch.tensor([6, 6, 6]), 1))
    texts = [torch.cat([prompt, token[None]]) for token in tokens]
    exact, plain = (dense_logits(paged.model, texts, dtype) for dtype in (torch.float64, torch.float32))
    assert_close_to_oracle("logits", logits, exact, plain)
    # The full tile of the prompt is one page a head, the tile with the new tokens one a beam.
    assert {len(cache) for cache in caches.values()} == {2 * (1 + 3)}


@pytest.mark.parametrize(
    ("first", "num_new", "beams", "error", "words"),
    [
        ([0], 0, [0], ValueError, "num_new_tokens must be at least 1"),
        ([0], 1.0, [0], TypeError, "num_new_tokens must be an int"),
        ([0, 0], 1, [0], ValueError, r"first_tokens must have shape \[R\] with R = 1"),
        ([0, 0], 1, None, ValueError, r"first_tokens must have shape \[R\] with R = 3"),
        ([0.0], 1, [0], TypeError, "first_tokens must have dtype int64"),
        ([-1], 1, [0], ValueError, "first_tokens must leave room for 1 tokens among the 24"),
        ([22], 3, [0], ValueError, "first_tokens must leave room for 3 tokens among the 24"),
        ([0, 0], 1, [1, 1], ValueError, "beam_ids must name no beam twice"),
        ([0], 1, [3], ValueError, "beam_ids must be from 0 to 2"),
        ([0], 1, [-1], ValueError, "beam_ids must be from 0 to 2"),
        ([0], 1, [0.0], TypeError, "beam_ids must have dtype int64"),
        ([0], 1, [[0]], ValueError, r"beam_ids must have shape \[R\]"),
    ],
)
def test_step_refuses(paged, first, num_new, beams, error, words):
    beam_ids = None if beams is None else torch.tensor(beams)
    with pytest.raises(error, match=words):
        TileStep(caches_for(paged), paged.geometry, torch.tensor(first), num_new, beam_ids)


def test_step_refuses_no_beams(paged):
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="beam_ids must name at least one beam"):
        TileStep(caches_for(paged), paged.geometry, none, 1, none)


def test_step_takes_the_last_place_of_a_beam(paged):
    caches = caches_for(paged)
    step = TileStep(caches, paged.geometry, torch.tensor([0]), 24, torch.tensor([0]))
    assert paged.forward(torch.arange(24), step).isfinite().all()


def test_step_refuses_caches_of_another_model(paged):
    first = torch.zeros(3, dtype=torch.int64)
    caches = caches_for(paged)
    with pytest.raises(ValueError, match=r"caches must be of the layers \[0, 1\].*got \[0\]"):
        TileStep({0: caches[0]}, paged.geometry, first, 1)
    other = caches_for(PagedModel(tiny_model("qwen3")))
    with pytest.raises(ValueError, match=r"cache of layer 1 must have heads, head_dim and value_dim \(2, 8, 8\)"):
        TileStep({0: caches[0], 1: other[1]}, paged.geometry, first, 1)
    wider = caches_for(paged, num_beams=4)
    with pytest.raises(ValueError, match="caches must all have the same beams"):
        TileStep({0: caches[0], 1: wider[1]}, paged.geometry, first, 1)


def test_step_refuses_states_that_are_not_packed(paged):
    caches = caches_for(paged)
    step = TileStep(caches, paged.geometry, torch.tensor([0]), 3, torch.tensor([0]))
    with pytest.raises(ValueError, match="packed into one row, got a batch of 2"):
        step.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
    with pytest.raises(ValueError, match=r"states must have shape \[1, H, T, D\] with T = 3"):
        step.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    with pytest.raises(ValueError, match="layer 2 must be one that stores"):
        step.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 2)
    assert all(len(cache) == 0 for cache in caches.values())


def test_step_refuses_attention_sinks_before_anything_is_written():
    paged = PagedModel(tiny_model("gpt_oss"))
    with pytest.raises(UnsupportedModelError, match="layer 0 needs attention sinks, which tiles do not have"):
        TileStep(caches_for(paged), paged.geometry, torch.tensor([0]), 3, torch.tensor([0]))
    assert [layer.has_sinks for layer in paged.geometry.layers.values()] == [True, True]


def test_default_device_and_dtype_of_the_caller_do_not_matter(paged):
    caches, first, ids = caches_for(paged), torch.tensor([4, 0, 9]), torch.arange(6)
    with other_defaults():
        step = TileStep(caches, paged.geometry, first, 2)
        assert {tensor.dtype for tensor in (step.beam_ids, step.position_ids, step.last_rows())} == {torch.int64}
        assert (step.position_ids.tolist(), step.last_rows().tolist()) == ([4, 5, 0, 1, 9, 10], [1, 3, 5])
        fresh = TileStep(caches, paged.geometry, torch.zeros_like(first, device="cpu"), 2)
        logits = paged.forward(ids, fresh)
    again = paged.forward(ids, TileStep(caches_for(paged), paged.geometry, torch.zeros_like(first), 2))
    assert same_bits(logits, again)


class Config:
    """A config that may raise when it is told to name another attention function."""

    def __init__(self, error=None):
        self.said = "eager"
        self.error = error

    @property
    def _attn_implementation_internal(self):
        return self.said

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, name):
        self.said = name
        if self.error is not None and name == "pagedkv":
            raise self.error


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt("planted")], ids=repr)
def test_attention_is_as_it_was_when_entering_is_interrupted(error, place):
    configs = [Config(error if index == place else None) for index in range(3)]
    with pytest.raises(type(error), match="planted"), using_attention(configs, "pagedkv"):
        pytest.fail("the block must not be entered")
    assert [config.said for config in configs] == ["eager"] * 3
    configs[place].error = None
    # Nothing is left in the books either: who comes next finds and leaves what the configs said.
    with using_attention(configs, "pagedkv"):
        assert [config.said for config in configs] == ["pagedkv"] * 3
    assert [config.said for config in configs] == ["eager"] * 3


@pytest.mark.parametrize("place", [0, 1, 2])
def test_interrupted_entering_leaves_others_inside(place):
    shared = [Config(), Config()]
    interrupted = [*shared[:place], Config(KeyboardInterrupt()), *shared[place:]]
    with using_attention(shared, "pagedkv"):
        with pytest.raises(KeyboardInterrupt), using_attention(interrupted, "pagedkv"):
            pytest.fail("the block must not be entered")
        assert [config.said for config in interrupted] == [
            "eager" if config.error else "pagedkv" for config in interrupted
        ]
    assert [config.said for config in interrupted] == ["eager"] * 3


def test_check_that_is_interrupted_leaves_the_model_in_training():
    model = tiny_model("llama").train()

    def interrupted():
        model.model.training = False
        raise KeyboardInterrupt

    model.eval = interrupted
    with pytest.raises(KeyboardInterrupt):
        check_model(model)
    assert all(module.training for module in model.modules())
