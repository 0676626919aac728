"""What one request gets wrong never reaches another, and an interrupt loses no token."""

import asyncio
import math

import pytest
import torch

from pagedkv import check_integrity
from pagedkv.engine import Engine, SamplingParams
from pagedkv.testing.tiny_models import byte_tokenizer, tiny_model


@pytest.fixture
def llama():
    return tiny_model("llama")


def greedy(num_tokens):
    return SamplingParams(max_new_tokens=num_tokens)


def test_a_namespace_of_no_known_type_is_refused_at_submit(llama):
    engine = Engine(llama, num_pages=20)
    with pytest.raises(TypeError, match="namespace must be None, a str, bytes, an int or a tuple of these, got float"):
        engine.submit([1, 2, 3], namespace=1.5)
    assert not engine.has_work


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_an_interrupt_in_a_callback_loses_no_token(llama, sampling):
    params = SamplingParams(max_new_tokens=5, **sampling)
    expected = [result.token_ids for result in Engine(llama, num_pages=20).generate([[1, 2, 3], [4, 5, 6]], params)]
    engine = Engine(llama, num_pages=20)

    def interrupt(event):
        if event.request.num_new_tokens == 2:
            raise asyncio.CancelledError

    requests = [engine.submit([1, 2, 3], params, on_token=interrupt), engine.submit([4, 5, 6], params)]
    with pytest.raises(asyncio.CancelledError):
        engine.run()
    engine.run()
    assert [request.result().token_ids for request in requests] == expected
    check_integrity(engine.manager)


def test_an_interrupt_anywhere_in_a_step_is_made_good(llama, monkeypatch):
    expected = Engine(llama, num_pages=20).generate([[1, 2, 3], [4, 5, 6]], greedy(4))
    engine = Engine(llama, num_pages=20)
    requests = [engine.submit(prompt, greedy(4)) for prompt in ([1, 2, 3], [4, 5, 6])]
    engine.step()
    run = engine._runner.run

    def interrupted(*args):
        run(*args)
        raise KeyboardInterrupt  # computed and committed, not sampled into the requests

    monkeypatch.setattr(engine._runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    engine.run()
    assert [request.result().token_ids for request in requests] == [result.token_ids for result in expected]


class BrokenTokenizer:
    """Decodes nothing."""

    def __getattr__(self, name):
        return getattr(byte_tokenizer(), name)

    def decode(self, *args, **kwargs):
        raise IndexError("no such piece")


def test_a_tokenizer_that_raises_is_the_answer_of_its_requests(llama):
    engine = Engine(llama, BrokenTokenizer(), num_pages=20)
    request = engine.submit([1, 2, 3], greedy(3))
    engine.run()
    assert (request.finish_reason, str(request.error)) == ("error", "no such piece")
    engine.submit([1, 2, 3], greedy(3))
    engine.close()
    assert engine.stats().num_pages_free == 20


@pytest.mark.parametrize("broken", [math.inf, -math.inf])
def test_logits_without_a_finite_maximum_are_an_error(broken):
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: torch.full_like(output, broken))
    result = Engine(model, num_pages=20).generate([[1, 2, 3]])[0]
    assert f"must have a finite maximum, got {broken}" in str(result.error)


def test_large_seeds_work_and_too_large_ones_are_refused(llama):
    engine = Engine(llama, num_pages=20, seed=2**62)
    assert len(engine.generate([[1, 2]], SamplingParams(max_new_tokens=2, temperature=1.0))[0].token_ids) == 2
    with pytest.raises(ValueError, match=r"seed must be below 2\*\*64"):
        SamplingParams(seed=2**64)
    with pytest.raises(ValueError, match="each of stop_token_ids must be at least 0, got -4"):
        SamplingParams(stop_token_ids=(-4,))


def test_one_prompt_is_not_a_list_of_prompts(llama):
    with pytest.raises(TypeError, match="prompts must be a list of prompts, got one str"):
        Engine(llama, byte_tokenizer(), num_pages=20).generate("hello")
    with pytest.raises(TypeError, match="prompt must be text, token ids or chat messages, got bytes"):
        Engine(llama, byte_tokenizer(), num_pages=20).submit(b"hello")


def test_longrope_is_held_to_the_length_at_which_batches_cannot_matter():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": 32,
        "factor": 8.0,
    }
    model = tiny_model("llama", rope_parameters=rope)
    engine = Engine(model, num_pages=40)
    too_long = engine.submit(list(range(40)), greedy(4))
    assert "must be shorter than the model's context of 32 tokens, got 40" in str(too_long.error)
    alone = Engine(model, num_pages=40).generate([[1, 2, 3]], greedy(12))[0].token_ids
    assert engine.generate([[1, 2, 3], list(range(31))], greedy(12))[0].token_ids == alone


def test_checking_a_model_leaves_every_module_as_it_was():
    model = tiny_model("llama")
    model.model.layers[0].train()
    before = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="seed must be at least 0"):
        Engine(model, seed=-1)
    Engine(model, num_pages=4)
    assert [module.training for module in model.modules()] == before
