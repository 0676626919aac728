"""Beam search in the engine: the beams of transformers whatever else runs, and pages copied only where they must be."""

import functools
import itertools
import math

import pytest
import torch

from pagedkv.engine import Engine, SamplingParams
from pagedkv.engine.beam_search import BeamSearch
from pagedkv.management import check_integrity
from pagedkv.testing.beams import expected_beams, prompt_of
from pagedkv.testing.tiny_models import byte_tokenizer, tiny_model

NAMES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gemma3n", "gpt2", "opt", "gpt_oss"]
PAGE_SIZES = [1, 4, 16]


@functools.cache
def model_of(name):
    """One model of a kind for all tests that leave it as it is."""
    return tiny_model(name)


def beams_of(num_beams, **options):
    return SamplingParams(num_beams=num_beams, **options)


def tokens_of(result):
    return [continuation.token_ids for continuation in result.continuations]


def expected_tokens(model, prompt, params):
    """Those of transformers, without the EOS that ends them, as results have them."""
    eos = params.stop_token_ids or ()
    found = expected_beams(
        model,
        torch.tensor(prompt),
        params.num_beams,
        eos_token_ids=eos,
        max_new_tokens=params.max_new_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        num_return_sequences=params.num_return_sequences,
    )
    return [tokens[:-1] if tokens[-1] in eos else tokens for tokens in found.token_ids], found.scores


def assert_nothing_is_left(engine):
    assert not engine.has_work
    assert engine.manager.stats().num_sequences == 0
    check_integrity(engine.manager)


@pytest.mark.parametrize(
    ("name", "page_size"),
    [*itertools.product(("llama", "gemma3n"), PAGE_SIZES), *((name, 4) for name in NAMES[1:] if name != "gemma3n")],
)
def test_tokens_are_those_of_transformers(name, page_size):
    """Prompts of one token and around the borders of pages, one after another over the same prefix cache."""
    model = model_of(name)
    engine = Engine(model, page_size=page_size, num_pages=640 // page_size)
    for num_beams, num_tokens, penalty in ((2, 1, 2.0), (3, 16, 0.0), (3, 17, 1.0), (5, 15, -1.0)):
        prompt = prompt_of(num_tokens, num_beams).tolist()
        params = beams_of(num_beams, max_new_tokens=6, length_penalty=penalty, num_return_sequences=num_beams)
        result = engine.generate([prompt], params)[0]
        tokens, scores = expected_tokens(model, prompt, params)
        assert tokens_of(result) == tokens
        assert (result.token_ids, result.finish_reason) == (tokens[0], "length")
        found = torch.tensor([continuation.score for continuation in result.continuations])
        assert torch.equal(found.sort(descending=True).values, found)
        # Sums of six float32 log-probabilities by two computations of the same model.
        assert (found - torch.tensor(scores)).abs().max() < 1e-4
        assert_nothing_is_left(engine)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(
    ("penalty", "stopping"), [(0.0, True), (1.0, False), (-1.0, "never"), (1.0, "never"), (2.0, True)]
)
def test_eos_ends_beams_as_in_transformers(penalty, stopping, page_size):
    reasons = set()
    for seed, (name, places) in enumerate((("llama", (2,)), ("gemma2", (1, 5)), ("llama", (3, 4)))):
        model, prompt, num_beams = model_of(name), prompt_of(6 + seed, seed).tolist(), 2 + seed
        engine = Engine(model, page_size=page_size, num_pages=320 // page_size)
        likely = engine.generate([prompt], beams_of(num_beams, max_new_tokens=10))[0].token_ids
        params = beams_of(
            num_beams,
            max_new_tokens=10,
            stop_token_ids=tuple({likely[place] for place in places}),
            length_penalty=penalty,
            early_stopping=stopping,
            num_return_sequences=num_beams - 1,
        )
        result = engine.generate([prompt], params)[0]
        assert tokens_of(result) == expected_tokens(model, prompt, params)[0]
        reasons |= {continuation.finish_reason for continuation in result.continuations}
        ignoring = engine.generate([prompt], beams_of(num_beams, max_new_tokens=10, ignore_eos=True))[0]
        assert ignoring.token_ids == likely
        assert_nothing_is_left(engine)
    # Ended by an EOS, but where the penalty lets all others win.
    assert penalty > 1 or "stop" in reasons


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 1, "num_pages": 400},
        {"page_size": 4, "num_pages": 100},
        {"page_size": 16, "num_pages": 40},
        {"page_size": 4, "num_pages": 100, "max_batch_tokens": 14},
        {"page_size": 4, "num_pages": 100, "max_num_seqs": 5},
        {"page_size": 4, "num_pages": 34},
        {"page_size": 4, "num_pages": 26, "max_batch_tokens": 16, "prefix_cache": False},
        {"page_size": 1, "num_pages": 110, "prefix_cache": False},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_beams_are_the_same_while_others_run(options):
    engine = Engine(model_of("llama"), **options)
    for _ in range(2):
        results = engine.generate(MIXED_PROMPTS, MIXED_PARAMS)
        assert [tokens_of(result) for result in results] == mixed_tokens()
        assert_nothing_is_left(engine)
    assert (engine.stats().num_preemptions > 0) == (options["num_pages"] in (26, 34, 110))


MIXED_PROMPTS = [prompt_of(length, seed).tolist() for seed, length in enumerate((9, 21, 5, 13, 16))]
MIXED_PARAMS = [
    beams_of(3, max_new_tokens=12, num_return_sequences=3),
    SamplingParams(max_new_tokens=20),
    beams_of(4, max_new_tokens=8, length_penalty=0.5, num_return_sequences=2),
    SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, n=3),
    beams_of(2, max_new_tokens=14, early_stopping=True),
]


@functools.cache
def mixed_tokens():
    """What each of them gets alone: of beams what transformers gives."""
    model, tokens = model_of("llama"), []
    for prompt, params in zip(MIXED_PROMPTS, MIXED_PARAMS, strict=True):
        if params.num_beams > 1:
            tokens.append(expected_tokens(model, prompt, params)[0])
        else:
            tokens.append(tokens_of(Engine(model, num_pages=100).generate([prompt], params)[0]))
    return tokens


def num_copies_needed(model, prompt, params, page_size):
    """Copies of a search whose beams share pages as far as they can: a beam's step needs one where its last page is
    partly filled and another beam that is yet to write into it has the same."""
    search = params.beam_search(params.max_new_tokens, params.stop_token_ids or ())
    beams, num_copies = [0] * params.num_beams, 0
    pages = [0] * params.num_beams  # the id of each beam's last page
    fresh = itertools.count(1)
    texts = [list(prompt)] * params.num_beams
    with torch.inference_mode():
        while True:
            logits = torch.stack([model(input_ids=torch.tensor([text])).logits[0, -1] for text in texts])
            step = search.step(logits)
            if search.is_done:
                return num_copies
            parents = step.parents.tolist()
            texts = [[*texts[parent], token] for parent, token in zip(parents, step.tokens.tolist(), strict=True)]
            pages = [pages[parent] for parent in parents]
            is_partial = (len(texts[0]) - 1) % page_size != 0
            for beam in range(len(beams)):
                if not is_partial:
                    pages[beam] = next(fresh)
                elif pages.count(pages[beam]) > 1:
                    pages[beam] = next(fresh)
                    num_copies += 1


@pytest.mark.parametrize("num_tokens", [15, 16, 17])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_only_partly_filled_pages_that_are_shared_are_copied(page_size, num_tokens):
    model, prompt = model_of("llama"), prompt_of(num_tokens, 1).tolist()
    params = beams_of(4, max_new_tokens=10)
    engine = Engine(model, page_size=page_size, num_pages=400 // page_size)
    engine.generate([prompt], params)
    num_copies = engine.manager.stats().copied_pages
    assert num_copies == num_copies_needed(model, prompt, params, page_size)
    assert (num_copies > 0) == (page_size > 1)


def test_prompt_is_computed_once_and_its_pages_are_shared():
    engine = Engine(model_of("llama"), page_size=4, num_pages=100)
    request = engine.submit(prompt_of(33, 0).tolist(), beams_of(4, max_new_tokens=3))
    engine.step()
    assert engine.manager.stats().shared == 9
    assert engine.manager.stats().owned == 9
    assert engine.manager.stats().copied_pages == 0
    engine.step()
    assert engine.manager.stats().copied_pages == 3  # the last writes into the page itself
    engine.run()
    assert engine.stats().num_prefill_tokens == 33
    assert engine.stats().num_decode_tokens == 2 * 4
    assert len(request.result().token_ids) == 3


def test_what_beams_have_in_common_is_computed_again_once():
    engine = Engine(model_of("llama"), page_size=4, num_pages=100, prefix_cache=False)
    request = engine.submit(prompt_of(9, 2).tolist(), beams_of(3, max_new_tokens=20))
    for _ in range(14):
        engine.step()
    texts = [beam.ids for beam in request.continuations]
    num_common = next(at for at, tokens in enumerate(zip(*texts, strict=True)) if len(set(tokens)) > 1)
    assert num_common > 9
    engine._scheduler._preempt(request)
    num_computed = 0
    while request.search.num_new_tokens == 14:
        num_computed += engine.step().num_tokens
    assert num_computed == num_common + 3 * (len(texts[0]) - num_common)


def test_more_beams_than_tokens():
    model = tiny_model("llama", vocab_size=3, bos_token_id=0, pad_token_id=0)
    params, prompt = beams_of(5, max_new_tokens=4, num_return_sequences=5), [1, 0, 2, 1, 1]
    result = Engine(model, page_size=4, num_pages=40).generate([prompt], params)[0]
    assert tokens_of(result) == expected_tokens(model, prompt, params)[0]


def test_one_beam_is_greedy_of_transformers():
    model, prompt = model_of("llama"), prompt_of(7, 3).tolist()
    params = beams_of(1, max_new_tokens=12, length_penalty=2.0)
    result = Engine(model, num_pages=40).generate([prompt], params)[0]
    assert tokens_of(result) == expected_tokens(model, prompt, params)[0]


def test_quantised_pages_give_the_beams_of_a_rounded_cache():
    model, prompt = model_of("gemma2"), prompt_of(12, 12)
    engine = Engine(model, page_size=4, num_pages=60, kv_dtype=torch.int8)
    result = engine.generate([prompt], beams_of(3, max_new_tokens=6, num_return_sequences=3))[0]
    expected = expected_beams(model, prompt, 3, kv_dtype=torch.int8, max_new_tokens=6, num_return_sequences=3)
    assert tokens_of(result) == expected.token_ids


def test_log_probabilities_and_text_of_beams():
    model, prompt = model_of("llama"), prompt_of(6, 1).tolist()
    events = []
    engine = Engine(model, byte_tokenizer(), num_pages=40)
    params = beams_of(3, max_new_tokens=7, length_penalty=0.5, num_return_sequences=2)
    result = engine.generate([prompt], params, on_token=events.append)[0]
    for continuation in result.continuations:
        text = torch.tensor([[*prompt, *continuation.token_ids]])
        with torch.inference_mode():
            logits = model(input_ids=text).logits[0, len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(continuation.token_ids)[:, None])
        assert math.isclose(continuation.cumulative_logprob, float(chosen.sum()), abs_tol=1e-4)
        assert math.isclose(continuation.score, continuation.cumulative_logprob / 7**0.5, rel_tol=1e-6)
        assert continuation.text == engine.tokenizer.decode(continuation.token_ids, skip_special_tokens=True)
    # Told once they are certain: one event each, the best first.
    assert [(event.index, event.token_ids, event.text, event.finished) for event in events] == [
        (each.index, each.token_ids, each.text, True) for each in result.continuations
    ]


def test_cancelled_and_failed_searches_give_everything_back():
    model = model_of("llama")
    engine = Engine(model, page_size=4, num_pages=60)
    events = []
    request = engine.submit([1, 2, 3], beams_of(3, num_return_sequences=2), on_token=events.append)
    for _ in range(4):
        engine.step()
    assert engine.cancel(request)
    assert (request.finish_reason, tokens_of(request.result())) == ("cancelled", [()])
    assert [(event.finish_reason, event.index) for event in events] == [("cancelled", 0)]
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt("planted")], ids=repr)
def test_model_that_fails_in_the_middle_hurts_no_search(error):
    """An error is run again request by request, beams together; an interrupt goes on where it was."""
    model, calls = model_of("llama"), itertools.count()
    prompts, params = [[1, 2, 3], [4, 5, 6, 7, 8]], [beams_of(3, max_new_tokens=6), beams_of(2, max_new_tokens=5)]
    expected = [tokens_of(result) for result in Engine(model, num_pages=60).generate(prompts, params)]
    engine = Engine(model, page_size=4, num_pages=60)
    requests = [engine.submit(prompt, chosen) for prompt, chosen in zip(prompts, params, strict=True)]

    def fail(*_):
        if next(calls) == 3:
            raise error

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        if isinstance(error, Exception):
            engine.run()
        else:
            with pytest.raises(KeyboardInterrupt):
                engine.run()
            check_integrity(engine.manager)
            engine.run()
    finally:
        handle.remove()
    assert [tokens_of(request.result()) for request in requests] == expected
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("place", ["before", "after"])
def test_interrupt_around_a_step_of_the_search_is_made_good(monkeypatch, place):
    """After the search's own step the beams lag behind it: they are laid out anew with its tokens."""
    model, params = model_of("llama"), beams_of(3, max_new_tokens=7, num_return_sequences=3)
    expected = tokens_of(Engine(model, num_pages=60).generate([[1, 2, 3]], params)[0])
    for at in range(7):
        engine, calls, step = Engine(model, page_size=4, num_pages=60), itertools.count(), BeamSearch.step

        def interrupted(search, logits, calls=calls, step=step, at=at):
            is_here = next(calls) == at
            if is_here and place == "before":
                raise KeyboardInterrupt
            result = step(search, logits)
            if is_here:
                raise KeyboardInterrupt
            return result

        request = engine.submit([1, 2, 3], params)
        monkeypatch.setattr(BeamSearch, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.run()
        monkeypatch.undo()
        engine.run()
        assert tokens_of(request.result()) == expected
        assert_nothing_is_left(engine)


def test_broken_logits_are_the_error_of_the_search_alone():
    model = model_of("llama")
    engine, poison = Engine(model, page_size=4, num_pages=60), 251

    def broken(module, arguments):
        if bool((arguments[0] == poison).any()):
            raise RuntimeError("planted")

    handle = model.model.embed_tokens.register_forward_pre_hook(broken)
    try:
        requests = [engine.submit([1, 2, 3], SamplingParams(8)), engine.submit([1, poison], beams_of(3))]
        engine.run()
    finally:
        handle.remove()
    assert [request.finish_reason for request in requests] == ["length", "error"]
    assert str(requests[1].error) == "planted"
    assert_nothing_is_left(engine)


def test_search_that_finds_nothing_is_an_error():
    params = beams_of(2, max_new_tokens=8, length_penalty=-12.0, stop_token_ids=(0,))
    result = Engine(model_of("llama"), num_pages=40).generate([[1, 2, 3]], params)[0]
    assert result.finish_reason == "error"
    assert "beam search must find a text, got none with a score above -1e9" in str(result.error)


def test_answers_end_where_the_pool_does():
    """Full pages of the prompt once, all others a beam: 1 + 2 * 2 of 5 pages, and the last token needs none."""
    model, prompt = model_of("llama"), prompt_of(5, 1).tolist()
    engine = Engine(model, page_size=4, num_pages=5)
    result = engine.generate([prompt], beams_of(2))[0]
    assert (result.finish_reason, len(result.token_ids)) == ("length", 8)
    assert tokens_of(result) == expected_tokens(model, prompt, beams_of(2, max_new_tokens=8))[0]
    assert engine.stats().peak_pages_used == 5


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
        ({"num_beams": 2.0}, TypeError, "num_beams must be an int"),
        ({"num_beams": 2, "num_return_sequences": 3}, ValueError, r"num_return_sequences must be at most 2"),
        ({"num_return_sequences": 2}, ValueError, r"num_return_sequences must be at most 1 \(num_beams\), got 2"),
        ({"num_beams": 2, "early_stopping": "soon"}, ValueError, "early_stopping must be True, False or 'never'"),
        ({"num_beams": 2, "length_penalty": "1"}, TypeError, "length_penalty must be a number"),
        ({"num_beams": 2, "temperature": 1.0}, ValueError, "temperature must be 0 for a beam search, got 1.0"),
        ({"num_beams": 2, "stop": "end"}, ValueError, r"stop must be empty for a beam search, got \('end',\)"),
        ({"num_beams": 2, "n": 2}, ValueError, "n and best_of must be 1 for a beam search, got 2. Use num_return"),
    ],
)
def test_params_of_a_beam_search_refuse(options, error, words):
    with pytest.raises(error, match=words):
        SamplingParams(**options)


def test_engine_refuses_more_beams_than_it_can_run_and_unknown_back_ends():
    engine = Engine(model_of("llama"), num_pages=40, max_num_seqs=3)
    with pytest.raises(ValueError, match=r"params must ask for at most 3 continuations \(max_num_seqs.*, got 4"):
        engine.submit([1, 2], beams_of(4))
    assert not engine.has_work
    with pytest.raises(ValueError, match="backend must be 'auto' or .*'reference'.*, got 'none'"):
        Engine(model_of("llama"), num_pages=40, backend="none")
