"""Several continuations of one prompt: each as if it were alone, on pages that are shared as long as they can be."""

import itertools
import math

import pytest
import torch

from pagedkv.engine import Engine, SamplingParams
from pagedkv.engine.page_needs import longest_answer
from pagedkv.engine.sampling import seed_of
from pagedkv.management import check_integrity
from pagedkv.management.sequence import Sequence
from pagedkv.testing.beams import prompt_of
from pagedkv.testing.tiny_models import byte_tokenizer, tiny_model

PROMPT = prompt_of(13, 0).tolist()


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def samples_of(n, **options):
    return SamplingParams(**{"temperature": 1.0, "seed": 7, "max_new_tokens": 12, "n": n, **options})


def tokens_of(result):
    return [continuation.token_ids for continuation in result.continuations]


def one_by_one(model, prompt, params, **options):
    """Each continuation as a request of its own, in an engine that shares nothing."""
    num_samples = params.best_of or params.n
    singles = [
        SamplingParams(params.max_new_tokens, params.temperature, seed=seed_of(params.seed, index))
        for index in range(num_samples)
    ]
    engine = Engine(model, num_pages=200, prefix_cache=False, **options)
    return [engine.generate([prompt], single)[0] for single in singles]


def assert_nothing_is_left(engine):
    assert not engine.has_work
    assert engine.manager.stats().num_sequences == 0
    check_integrity(engine.manager)


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 1, "num_pages": 200},
        {"page_size": 4, "num_pages": 100},
        {"page_size": 16, "num_pages": 20},
        {"page_size": 4, "num_pages": 100, "max_batch_tokens": 7},
        {"page_size": 4, "num_pages": 100, "prefix_cache": False},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_each_continuation_is_a_request_of_its_own_seed(llama, options):
    engine = Engine(llama, **options)
    expected = [result.token_ids for result in one_by_one(llama, PROMPT, samples_of(5))]
    assert len(set(expected)) == 5
    for _ in range(2):
        result = engine.generate([PROMPT], samples_of(5))[0]
        assert tokens_of(result) == expected
        assert [continuation.index for continuation in result.continuations] == [0, 1, 2, 3, 4]
        assert (result.token_ids, result.finish_reason) == (expected[0], "length")
        assert_nothing_is_left(engine)


def test_the_first_is_what_one_alone_is(llama):
    engine = Engine(llama, num_pages=50)
    first = engine.generate([PROMPT], samples_of(1))[0]
    assert tokens_of(engine.generate([PROMPT], samples_of(3))[0])[0] == first.token_ids
    assert tokens_of(first) == [first.token_ids]


def test_seeds_follow_from_the_engine_where_none_is_given(llama):
    params = samples_of(3, seed=None)
    runs = [Engine(llama, num_pages=50, seed=seed).generate([PROMPT, PROMPT], params) for seed in (1, 1, 2)]
    tokens = [[tokens_of(result) for result in run] for run in runs]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len(set(tokens[0][0] + tokens[0][1])) == 6


@pytest.mark.parametrize("num_tokens", [15, 16, 17])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_prompt_is_computed_once_and_only_its_partly_filled_page_is_copied(llama, page_size, num_tokens):
    engine = Engine(llama, page_size=page_size, num_pages=800 // page_size)
    request = engine.submit(prompt_of(num_tokens, 1).tolist(), samples_of(6, max_new_tokens=20))
    engine.step()
    stats = engine.manager.stats()
    num_pages = -(-num_tokens // page_size)
    assert (stats.num_sequences, stats.owned, stats.shared, stats.copied_pages) == (6, num_pages, num_pages, 0)
    engine.run()
    # The last one to write into the prompt's last page has it for itself.
    assert engine.manager.stats().copied_pages == (5 if num_tokens % page_size else 0)
    assert engine.stats().num_prefill_tokens == num_tokens
    assert engine.stats().num_decode_tokens == 6 * 19
    assert len({tuple(tokens) for tokens in tokens_of(request.result())}) == 6


def test_sampling_does_not_depend_on_the_batch_or_on_preemptions(llama):
    prompts = [prompt_of(length, seed).tolist() for seed, length in enumerate((9, 14, 6, 21))]
    params = [samples_of(3, seed=1), samples_of(1, seed=2), samples_of(4, seed=3, best_of=5), samples_of(2, seed=4)]
    alone = [
        Engine(llama, num_pages=100).generate([prompt], chosen)[0]
        for prompt, chosen in zip(prompts, params, strict=True)
    ]
    for options in ({"num_pages": 100}, {"num_pages": 24}, {"num_pages": 24, "prefix_cache": False}):
        for max_batch_tokens in (8, 2048):
            engine = Engine(llama, page_size=4, max_batch_tokens=max_batch_tokens, **options)
            results = engine.generate(prompts, params)
            assert [tokens_of(result) for result in results] == [tokens_of(result) for result in alone]
            assert (engine.stats().num_preemptions > 0) == (options["num_pages"] == 24)
            assert_nothing_is_left(engine)


def test_tokens_computed_again_are_computed_once_where_they_are_shared(llama):
    """After a preemption without prefix cache: the prompt once, then what each has of its own."""
    engine = Engine(llama, page_size=4, num_pages=22, prefix_cache=False)
    old = engine.submit(prompt_of(20, 5).tolist(), samples_of(1, max_new_tokens=45))
    request = engine.submit(PROMPT, samples_of(3, max_new_tokens=20))
    engine.run()
    assert (old.num_preemptions, request.num_preemptions) == (0, 1)
    computed_again = engine.stats().num_prefill_tokens - 20 - 13
    assert 13 <= computed_again < 13 + 3 * 20
    assert tokens_of(request.result()) == [
        each.token_ids for each in one_by_one(llama, PROMPT, samples_of(3, max_new_tokens=20))
    ]


def exact_logprobs(model, prompt, token_ids):
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *token_ids]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(token_ids)[:, None]).flatten().tolist()


def test_log_probabilities_are_those_of_the_model_before_sampling_options(llama):
    result = Engine(llama, num_pages=50).generate([PROMPT], samples_of(3, temperature=0.7, top_k=9, top_p=0.9))[0]
    greedy = Engine(llama, num_pages=50).generate([PROMPT], SamplingParams(5))[0]
    for continuation in (*result.continuations, *greedy.continuations):
        exact = exact_logprobs(llama, PROMPT, continuation.token_ids)
        assert math.isclose(continuation.cumulative_logprob, sum(exact), rel_tol=1e-5)
        assert math.isclose(continuation.score, sum(exact) / len(exact), rel_tol=1e-5)


def test_an_eos_counts_in_the_log_probability_and_is_no_token(llama):
    whole = Engine(llama, num_pages=50).generate([PROMPT], samples_of(1))[0]
    eos = whole.token_ids[4]
    end = whole.token_ids.index(eos)
    result = Engine(llama, num_pages=50).generate([PROMPT], samples_of(2, stop_token_ids=(eos,)))[0]
    first = result.continuations[0]
    assert (first.finish_reason, first.token_ids) == ("stop", whole.token_ids[:end])
    exact = exact_logprobs(llama, PROMPT, [*first.token_ids, eos])
    assert math.isclose(first.cumulative_logprob, sum(exact), rel_tol=1e-5)
    assert math.isclose(first.score, sum(exact) / (end + 1), rel_tol=1e-5)


def test_best_of_returns_the_likeliest_by_mean_log_probability(llama):
    every = one_by_one(llama, PROMPT, samples_of(8, max_new_tokens=9))
    eos = every[3].token_ids[3]  # answers of different lengths
    options = {"max_new_tokens": 9, "stop_token_ids": (eos,)}
    ranked = Engine(llama, num_pages=90).generate([PROMPT], samples_of(8, **options))[0].continuations
    ranked = sorted(ranked, key=lambda each: each.score, reverse=True)
    result = Engine(llama, num_pages=90).generate([PROMPT], samples_of(3, best_of=8, **options))[0]
    assert [each.index for each in result.continuations] == [each.index for each in ranked[:3]]
    assert tokens_of(result) == [each.token_ids for each in ranked[:3]]
    assert result.token_ids == ranked[0].token_ids
    assert len({len(each.token_ids) for each in ranked}) > 1
    assert [each.index for each in result.continuations] != [0, 1, 2]


def test_each_ends_by_itself_and_gives_its_pages_back_then(llama):
    expected = tokens_of(Engine(llama, num_pages=90).generate([PROMPT], samples_of(3, max_new_tokens=16))[0])
    eos = next(token for token in expected[1][3:9] if token not in expected[0] + expected[2])
    engine = Engine(llama, page_size=4, num_pages=60, prefix_cache=False)
    request = engine.submit(PROMPT, samples_of(3, max_new_tokens=16, stop_token_ids=(eos,)))
    while not request.continuations[1].finished:
        engine.step()
    stats, num_new = engine.manager.stats(), request.num_new_tokens
    assert not request.finished
    assert (stats.num_sequences, stats.owned) == (2, 3 + 2 * (-(-(13 + num_new - 1) // 4) - 3))
    engine.run()
    assert [each.finish_reason for each in request.result().continuations] == ["length", "stop", "length"]
    assert tokens_of(request.result()) == [expected[0], expected[1][: expected[1].index(eos)], expected[2]]
    assert_nothing_is_left(engine)


def test_events_of_each_continuation_add_up_to_its_result(llama):
    engine = Engine(llama, byte_tokenizer(), num_pages=60)
    events = []
    whole = engine.generate(["tell me"], samples_of(4, max_new_tokens=30, temperature=0.5))[0]
    text = whole.continuations[2].text
    stop = next(text[at : at + 2] for at in range(len(text) // 2, len(text)) if "�" not in text[at : at + 2])
    params = samples_of(4, max_new_tokens=30, temperature=0.5, stop=(stop,))
    result = engine.generate(["tell me"], params, on_token=events.append)[0]
    for continuation, before in zip(result.continuations, whole.continuations, strict=True):
        own = [event for event in events if event.index == continuation.index]
        assert tuple(token for event in own for token in event.token_ids) == continuation.token_ids
        assert "".join(event.text for event in own) == continuation.text == before.text.split(stop)[0]
        assert [event.finished for event in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].finish_reason == continuation.finish_reason
    assert result.continuations[2].finish_reason == "stop"


def test_cancel_in_the_middle_gives_everything_back(llama):
    engine = Engine(llama, page_size=4, num_pages=60, max_batch_tokens=8)
    for num_steps in (0, 1, 2, 3, 6):  # waiting, in prefill, with one token, and later
        events = []
        request = engine.submit(PROMPT, samples_of(4), on_token=events.append)
        for _ in range(num_steps):
            engine.step()
        assert engine.cancel(request)
        assert request.finish_reason == "cancelled"
        assert [each.finish_reason for each in request.result().continuations] == ["cancelled"] * 4
        assert [event.index for event in events if event.finished] == [0, 1, 2, 3]
        assert_nothing_is_left(engine)
        engine.clear_prefix_cache()


@pytest.mark.parametrize("at", [1, 2, 5, 17])
def test_callback_that_raises_ends_the_request_and_no_other(llama, at):
    engine, calls = Engine(llama, num_pages=60), itertools.count(1)

    def broken(event):
        if next(calls) == at:
            raise RuntimeError("planted")

    bad = engine.submit(PROMPT, samples_of(3, max_new_tokens=6), on_token=broken)
    good = engine.submit(PROMPT[:5], samples_of(2, max_new_tokens=6))
    engine.run()
    assert (bad.finish_reason, str(bad.error)) == ("error", "planted")
    assert tokens_of(good.result()) == [
        each.token_ids for each in one_by_one(llama, PROMPT[:5], samples_of(2, max_new_tokens=6))
    ]
    assert_nothing_is_left(engine)


def test_callback_may_cancel_its_own_request(llama):
    engine = Engine(llama, num_pages=60)
    events = []

    def on_token(event):
        events.append(event)
        if event.index == 1 and not event.finished:
            engine.cancel(event.request)

    request = engine.submit(PROMPT, samples_of(3), on_token=on_token)
    engine.run()
    assert request.finish_reason == "cancelled"
    assert sorted(event.index for event in events if event.finished) == [0, 1, 2]
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt("planted")], ids=repr)
def test_failed_forward_pass_loses_no_token(llama, error, at):
    prompts, params = [PROMPT, PROMPT[3:]], [samples_of(3, max_new_tokens=5), samples_of(2, max_new_tokens=5)]
    expected = [tokens_of(result) for result in Engine(llama, num_pages=60).generate(prompts, params)]
    engine, calls = Engine(llama, page_size=4, num_pages=60, max_batch_tokens=16), itertools.count()
    requests = [engine.submit(prompt, chosen) for prompt, chosen in zip(prompts, params, strict=True)]

    def fail(*_):
        if next(calls) == at:
            raise error

    handle = llama.model.layers[1].register_forward_pre_hook(fail)
    try:
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                engine.run()
            check_integrity(engine.manager)
        engine.run()
    finally:
        handle.remove()
    if isinstance(error, KeyboardInterrupt) or at:  # the first pass has one request, whose error it is
        assert [tokens_of(request.result()) for request in requests] == expected
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("num_forks", [0, 1, 2])
@pytest.mark.parametrize("is_preempted", [False, True])
def test_interrupt_between_the_forks_is_made_good(llama, monkeypatch, num_forks, is_preempted):
    """Of four continuations some have pages when it comes: they and the others get the tokens they would have got."""
    # One that an interrupt after the prompt's pass draws no random number for, and one of different texts.
    params = samples_of(4) if is_preempted else samples_of(4, temperature=1e-30)
    expected = tokens_of(Engine(llama, num_pages=60).generate([PROMPT], params)[0])
    engine, calls = Engine(llama, page_size=4, num_pages=60, prefix_cache=False), itertools.count()
    request = engine.submit(PROMPT, params)
    if is_preempted:
        for _ in range(4):
            engine.step()
        engine._scheduler._preempt(request)
    fork = Sequence.fork

    def interrupted(seq):
        if next(calls) == num_forks:
            raise KeyboardInterrupt
        return fork(seq)

    monkeypatch.setattr(Sequence, "fork", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert sum(each.seq is not None for each in request.continuations) == 1 + num_forks
    for _ in range(30):
        engine.step()
    assert tokens_of(request.result()) == expected
    assert_nothing_is_left(engine)


@pytest.mark.parametrize(
    ("num_tokens", "num_pages", "num_running"), [(12, 13, 1), (12, 14, 2), (13, 15, 1), (13, 16, 2)]
)
def test_admission_leaves_room_for_every_continuation_to_grow(llama, num_tokens, num_pages, num_running):
    """The second comes when its prompt's pages are there, and one for each of both requests' 4 continuations."""
    engine = Engine(llama, page_size=4, num_pages=num_pages, prefix_cache=False)
    for seed in (1, 2):
        engine.submit(prompt_of(num_tokens, seed).tolist(), samples_of(4, max_new_tokens=3))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (num_running, 2 - num_running)
    engine.run()
    assert engine.stats().num_preemptions == 0


def test_model_that_keeps_failing_ends_the_request(llama):
    engine, calls = Engine(llama, page_size=4, num_pages=60), itertools.count()

    def fail(*_):
        if next(calls) >= 3:
            raise RuntimeError("planted")

    request = engine.submit(PROMPT, samples_of(3))
    handle = llama.model.layers[1].register_forward_pre_hook(fail)
    try:
        engine.run()
    finally:
        handle.remove()
    assert (request.finish_reason, str(request.error)) == ("error", "planted")
    assert [len(each.token_ids) for each in request.result().continuations] == [3, 3, 3]
    assert_nothing_is_left(engine)


def test_continuations_count_as_sequences(llama):
    engine = Engine(llama, num_pages=90, max_num_seqs=5)
    requests = [engine.submit(prompt_of(5, seed).tolist(), samples_of(2)) for seed in range(3)]
    for _ in range(3):
        report = engine.step()
    assert (report.num_running, report.num_waiting, report.num_decode_tokens) == (2, 1, 4)
    engine.run()
    assert all(request.finish_reason == "length" for request in requests)
    with pytest.raises(ValueError, match="params must ask for at most 5 continuations .*, got 6"):
        engine.submit(PROMPT, samples_of(1, best_of=6))


def test_pages_held_by_others_are_answered_with_the_error(llama):
    engine = Engine(llama, page_size=4, num_pages=9)
    foreign = engine.manager.open([1])
    foreign.append(16)
    result = engine.generate([PROMPT], samples_of(4))[0]
    assert "cannot allocate 7 pages: 2 free, 3 evictable" in str(result.error)  # it was put back first
    assert [each.finish_reason for each in result.continuations] == ["error"] * 4
    assert all(len(each.token_ids) == 1 for each in result.continuations)  # what they had is in the answer
    foreign.close()
    assert engine.generate([PROMPT], samples_of(4))[0].finish_reason == "length"
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_answers_end_where_the_pool_does_and_fit_to_the_last_page(llama, n, num_tokens):
    for num_pages in (2, 3, 7):
        engine = Engine(llama, page_size=4, num_pages=num_pages, prefix_cache=False)
        result = engine.generate([prompt_of(num_tokens, 1).tolist()], samples_of(n, max_new_tokens=99))[0]
        length = longest_answer(num_tokens, n, num_pages, 4)
        assert [len(each.token_ids) for each in result.continuations] == [length] * n
        assert (result.finish_reason, result.num_preemptions) == ("length", 0)
        assert_nothing_is_left(engine)


def test_prompt_that_never_fits_is_answered_for_each(llama):
    events = []
    request = Engine(llama, page_size=4, num_pages=3).submit(PROMPT, samples_of(2), on_token=events.append)
    assert "prompt must have at most 12 tokens" in str(request.result().error)
    assert [(event.index, event.finish_reason) for event in events] == [(0, "error"), (1, "error")]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"n": 2.0}, TypeError, "n must be an int"),
        ({"n": 3, "best_of": 2}, ValueError, r"best_of must be at least 3 \(n\), got 2"),
        ({"best_of": True}, TypeError, "best_of must be an int"),
        ({"n": 2, "temperature": 0.0}, ValueError, "n must be 1 for temperature 0, .* got 2. Set a temperature"),
        ({"best_of": 2, "temperature": 0.0}, ValueError, "best_of must be 1 for temperature 0"),
    ],
)
def test_params_of_several_continuations_refuse(options, error, words):
    with pytest.raises(error, match=words):
        SamplingParams(**{"temperature": 1.0, **options})
