"""Engine: the greedy tokens of model.generate under every way of batching, and no request that hurts another."""

import threading

import pytest
import torch

from pagedkv.engine import Engine, SamplingParams
from pagedkv.integrations.transformers import UnsupportedModelError
from pagedkv.management import check_integrity
from pagedkv.testing.greedy import first_greedy_difference
from pagedkv.testing.rounded_cache import RoundedCache
from pagedkv.testing.tiny_models import VOCAB_SIZE, byte_tokenizer, tiny_model

NUM_TOKENS = 10


def random_ids(length, seed):
    return torch.randint(250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


SHARED = random_ids(29, seed=0)
PROMPTS = [(SHARED if i % 2 else []) + random_ids(n, seed=n) for i, n in enumerate((5, 13, 21, 1, 7, 33))]


def generated(model, prompt, num_tokens=NUM_TOKENS, **options):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(llama):
    return [generated(llama, prompt) for prompt in PROMPTS]


def assert_greedy(model, results, expected, kv_dtype=None):
    """Equal, or different only where the model's own rounding decides; the message shows the margin."""
    for result, theirs in zip(results, expected, strict=True):
        assert result.error is None
        difference = first_greedy_difference(model, result.prompt_ids, result.token_ids, theirs, kv_dtype=kv_dtype)
        assert difference is None or difference.is_tie, str(difference)


def assert_nothing_is_left(engine):
    assert not engine.has_work
    assert engine.manager.stats().num_sequences == 0
    check_integrity(engine.manager)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"page_size": 1, "num_pages": 400},
        {"page_size": 4, "max_batch_tokens": 7},
        {"page_size": 4, "max_batch_tokens": 16, "max_num_seqs": 2},
        {"page_size": 4, "num_pages": 19},
        {"page_size": 4, "num_pages": 19, "max_batch_tokens": 16},
        {"page_size": 4, "num_pages": 19, "prefix_cache": False},
        {"page_size": 64, "backend": "reference"},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "default",
)
def test_greedy_tokens_are_those_of_generate_cold_and_warm(llama, expected, options):
    engine = Engine(llama, **{"num_pages": 100, **options})
    for _ in range(2):
        results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NUM_TOKENS))
        assert_greedy(llama, results, expected)
        assert_nothing_is_left(engine)
    if "num_pages" in options and options["page_size"] == 4:
        assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gemma3n", "gpt_oss", "qwen2", "qwen3", "gpt2", "opt"])
def test_greedy_tokens_of_other_architectures(name):
    model = tiny_model(name)
    engine = Engine(model, page_size=4, num_pages=24, max_batch_tokens=16)
    for _ in range(2):
        results = engine.generate(PROMPTS[:4], SamplingParams(max_new_tokens=NUM_TOKENS))
        assert_greedy(model, results, [generated(model, prompt) for prompt in PROMPTS[:4]])
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_greedy_tokens_over_quantised_pages(name, kv_dtype):
    """Those of the model's own attention over what the pages stand for; prefix cache and preemptions lose no scale."""
    model = tiny_model(name)
    expected = [generated(model, prompt, past_key_values=RoundedCache(model.config, kv_dtype)) for prompt in PROMPTS]
    for options in ({"num_pages": 100}, {"num_pages": 19}, {"num_pages": 19, "prefix_cache": False}):
        engine = Engine(model, page_size=4, max_batch_tokens=16, kv_dtype=kv_dtype, **options)
        for _ in range(2):
            results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NUM_TOKENS))
            assert_greedy(model, results, expected, kv_dtype)
            assert_nothing_is_left(engine)
        stats = engine.stats()
        assert (stats.num_preemptions > 0) == (options["num_pages"] == 19)
        assert (stats.num_cached_tokens > 0) == options.get("prefix_cache", True)


def test_int8_pages_are_small_and_leave_the_likeliest_tokens_alone(llama, expected):
    engine = Engine(llama, page_size=4, num_pages=100, kv_dtype=torch.int8)
    results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NUM_TOKENS))
    assert [list(result.token_ids) for result in results] == expected
    # 2 layers, K and V, 2 heads: 8 codes and a scale, in place of 8 float32.
    assert engine.stats().pool_bytes == 100 * 4 * (2 * 2 * 2) * (8 + 4)


def test_shared_prompt_is_computed_once_though_all_arrive_together(llama):
    prompts = [SHARED + random_ids(3, seed) for seed in range(8)]
    engine = Engine(llama, page_size=4, num_pages=100)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=4))
    assert [result.num_cached_tokens for result in results] == [0] + [28] * 7
    stats = engine.stats()
    assert stats.num_prefill_tokens == 32 + 7 * 4
    assert stats.num_cached_tokens == 7 * 28
    assert stats.hit_rate == 7 * 28 / (8 * 32)
    assert stats.peak_pages_shared == 7
    assert stats.num_decode_tokens == 8 * 3
    assert_greedy(llama, results, [generated(llama, prompt, 4) for prompt in prompts])


def test_shared_prompt_is_waited_for_over_chunks(llama):
    prompts = [SHARED + random_ids(3, seed) for seed in range(4)]
    engine = Engine(llama, page_size=4, num_pages=100, max_batch_tokens=6)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=4))
    assert [result.num_cached_tokens for result in results] == [0, 28, 28, 28]


def test_request_that_waits_for_a_prefix_goes_on_when_its_leader_is_cancelled(llama):
    engine = Engine(llama, page_size=4, num_pages=100, max_batch_tokens=8)
    leader, follower = (engine.submit([*SHARED, token], SamplingParams(max_new_tokens=4)) for token in (1, 2))
    engine.step()
    assert (leader.status, follower.status) == ("running", "waiting")
    assert engine.cancel(leader)
    engine.run()
    assert follower.token_ids == generated(llama, [*SHARED, 2], 4)


def test_namespaces_share_nothing(llama):
    engine = Engine(llama, page_size=4, num_pages=100)
    first = engine.submit(SHARED, namespace="a")
    second = engine.submit(SHARED, namespace="b")
    engine.run()
    third = engine.submit(SHARED, namespace="b")
    engine.run()
    assert [request.num_cached_tokens for request in (first, second, third)] == [0, 0, 28]


def test_step_mixes_prefill_with_decode_under_the_budget(llama):
    engine = Engine(llama, page_size=4, num_pages=100, max_batch_tokens=8)
    engine.submit(PROMPTS[0], SamplingParams(max_new_tokens=20))
    engine.step()
    engine.submit(PROMPTS[2], SamplingParams(max_new_tokens=20))
    reports = [engine.step() for _ in range(4)]
    assert [(report.num_prefill_tokens, report.num_decode_tokens) for report in reports] == [
        (7, 1),
        (7, 1),
        (7, 1),
        (0, 2),
    ]
    assert all(report.seconds > 0 for report in reports)


def test_preempted_request_loses_no_token(llama):
    prompts = [random_ids(8, seed) for seed in range(3)]
    params = [
        SamplingParams(max_new_tokens=24),
        SamplingParams(max_new_tokens=24, temperature=1.0, seed=5),
        SamplingParams(max_new_tokens=24, temperature=0.8, top_p=0.9, seed=6),
    ]
    roomy = Engine(llama, page_size=4, num_pages=100).generate(prompts, params)
    engine = Engine(llama, page_size=4, num_pages=12)
    tight = engine.generate(prompts, params)
    assert sum(result.num_preemptions for result in tight) > 0
    assert [result.token_ids for result in tight] == [result.token_ids for result in roomy]
    assert tight[0].num_preemptions == 0  # the oldest keeps its pages
    assert engine.stats().num_preemptions == sum(result.num_preemptions for result in tight)
    assert_nothing_is_left(engine)


def test_sampling_does_not_depend_on_the_batch(llama):
    chosen = SamplingParams(max_new_tokens=12, temperature=1.2, top_k=20, top_p=0.95, seed=3)
    alone = Engine(llama, num_pages=50).generate([PROMPTS[1]], chosen)[0]
    others = [SamplingParams(max_new_tokens=8, temperature=0.7, seed=seed) for seed in range(5)]
    batch = Engine(llama, num_pages=50).generate(
        [*PROMPTS[:1], PROMPTS[1], *PROMPTS[2:]], [others[0], chosen, *others[1:]]
    )
    assert batch[1].token_ids == alone.token_ids
    assert alone.token_ids != tuple(generated(llama, PROMPTS[1], 12))


def test_unseeded_sampling_repeats_with_the_engine_seed(llama):
    params = SamplingParams(max_new_tokens=12, temperature=1.5)
    runs = [Engine(llama, num_pages=50, seed=seed).generate(PROMPTS[:2], params) for seed in (1, 1, 2)]
    tokens = [[result.token_ids for result in run] for run in runs]
    assert tokens[0] == tokens[1] != tokens[2]


def test_eos_of_the_model_ends_a_request_and_is_not_in_it(llama, expected):
    eos = expected[0][3]
    end = expected[0].index(eos)
    llama.generation_config.eos_token_id = eos
    try:
        engine = Engine(llama, num_pages=50)
    finally:
        llama.generation_config.eos_token_id = None
    result, ignoring = engine.generate([PROMPTS[0]] * 2, [SamplingParams(), SamplingParams(10, ignore_eos=True)])
    assert (result.finish_reason, list(result.token_ids)) == ("stop", expected[0][:end])
    assert (ignoring.finish_reason, list(ignoring.token_ids)) == ("length", expected[0])
    other = engine.generate([PROMPTS[0]], SamplingParams(10, stop_token_ids=(expected[0][-1],)))[0]
    assert list(other.token_ids) == expected[0][: expected[0].index(expected[0][-1])]


def test_answer_ends_where_pool_or_context_end(llama):
    result = Engine(llama, page_size=4, num_pages=3).generate([random_ids(5, 1)], SamplingParams(100))[0]
    assert (result.finish_reason, len(result.token_ids)) == ("length", 8)  # the last token needs no page
    result = Engine(llama, num_pages=50).generate([random_ids(250, 1)], SamplingParams(100))[0]
    assert (result.finish_reason, len(result.token_ids)) == ("length", 6)


@pytest.mark.parametrize(
    ("length", "num_pages", "words"),
    [
        (13, 3, "prompt must have at most 12 tokens"),
        (256, 100, "prompt must be shorter than the model's context of 256"),
    ],
)
def test_prompt_that_never_fits_is_answered_and_others_go_on(llama, length, num_pages, words):
    engine = Engine(llama, page_size=4, num_pages=num_pages)
    events = []
    bad = engine.submit(random_ids(length, 1), on_token=events.append)
    good = engine.submit(random_ids(4, 2), SamplingParams(max_new_tokens=4))
    assert bad.finished
    assert [event.finish_reason for event in events] == ["error"]
    engine.run()
    with pytest.raises(ValueError, match=words):
        raise bad.result().error
    assert good.result().finish_reason == "length"
    assert_nothing_is_left(engine)


def test_pages_held_by_others_are_answered_with_the_error(llama):
    engine = Engine(llama, page_size=4, num_pages=6)
    foreign = engine.manager.open([1])
    foreign.append(16)
    waiting = engine.generate([random_ids(12, 1)], SamplingParams(4))[0]
    assert "cannot allocate 3 pages: 2 free" in str(waiting.error)
    running = engine.generate([random_ids(7, 1)], SamplingParams(8))[0]
    assert "cannot allocate 3 pages: 0 free, 2 evictable" in str(running.error)
    assert len(running.token_ids) == 2  # what it had is in the answer
    foreign.close()
    assert engine.generate([random_ids(12, 1)], SamplingParams(4))[0].finish_reason == "length"


def test_error_of_the_model_is_answered_by_the_request_that_causes_it(llama, expected):
    poison = 251

    def broken(module, arguments):
        if bool((arguments[0] == poison).any()):
            raise RuntimeError("planted")

    hook = llama.model.embed_tokens.register_forward_pre_hook(broken)
    try:
        engine = Engine(llama, page_size=4, num_pages=100)
        requests = [
            engine.submit(prompt, SamplingParams(NUM_TOKENS)) for prompt in (PROMPTS[0], [1, 2, poison], PROMPTS[2])
        ]
        engine.run()
    finally:
        hook.remove()
    first, bad, last = (request.result() for request in requests)
    assert bad.finish_reason == "error"
    assert str(bad.error) == "planted"
    assert_greedy(llama, [first, last], [expected[0], expected[2]])
    assert_nothing_is_left(engine)


def test_interrupt_inside_a_step_loses_no_token(llama, expected):
    engine = Engine(llama, page_size=4, num_pages=100)
    request = engine.submit(PROMPTS[2], SamplingParams(NUM_TOKENS))
    for _ in range(3):
        engine.step()

    def interrupted(*args):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    hook.remove()
    check_integrity(engine.manager)
    engine.run()
    assert request.token_ids == expected[2]


def test_logits_that_are_no_numbers_are_an_error(llama):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    result = Engine(model, num_pages=20).generate([[1, 2, 3]])[0]
    assert "logits of request 0 must have a finite maximum, got nan" in str(result.error)


def test_cancel_waiting_running_finished(llama):
    engine = Engine(llama, page_size=4, num_pages=100, max_num_seqs=1)
    running, waiting = (engine.submit(prompt, SamplingParams(NUM_TOKENS)) for prompt in PROMPTS[:2])
    for _ in range(3):
        engine.step()
    assert engine.cancel(waiting)
    assert engine.cancel(running.id)
    assert not engine.cancel(running)
    assert not engine.cancel(99)
    assert [request.result().finish_reason for request in (running, waiting)] == ["cancelled", "cancelled"]
    assert len(running.token_ids) == 3
    assert [request.id for request in engine.step().finished] == [1, 0]
    assert_nothing_is_left(engine)


def test_callback_may_cancel_and_submit(llama, expected):
    engine = Engine(llama, page_size=4, num_pages=100)
    requests = []

    def on_token(event):
        if event.request.id == 0 and event.request.num_new_tokens == 2 and not event.finished:
            engine.cancel(requests[1])
            engine.cancel(requests[0])
            requests.append(engine.submit(PROMPTS[2], SamplingParams(NUM_TOKENS)))

    requests += [engine.submit(prompt, SamplingParams(NUM_TOKENS), on_token=on_token) for prompt in PROMPTS[:2]]
    engine.run()
    assert [request.finish_reason for request in requests] == ["cancelled", "cancelled", "length"]
    assert [len(request.token_ids) for request in requests[:2]] == [2, 1]
    assert requests[2].token_ids == expected[2]
    assert_nothing_is_left(engine)


def test_callback_that_raises_ends_its_own_request_alone(llama, expected):
    engine = Engine(llama, num_pages=100)

    def broken(event):
        raise RuntimeError("planted")

    bad = engine.submit(PROMPTS[0], SamplingParams(NUM_TOKENS), on_token=broken)
    good = engine.submit(PROMPTS[1], SamplingParams(NUM_TOKENS))
    engine.run()
    assert (bad.finish_reason, str(bad.error), len(bad.token_ids)) == ("error", "planted", 1)
    assert good.token_ids == expected[1]


def test_callback_must_not_step(llama):
    engine = Engine(llama, num_pages=100)
    result = engine.generate([PROMPTS[0]], on_token=lambda event: engine.step())[0]
    with pytest.raises(ValueError, match="step must not be called by on_token"):
        raise result.error


def test_events_add_up_to_the_result(llama):
    engine = Engine(llama, byte_tokenizer(), num_pages=100)
    events = []
    result = engine.generate(["héllo wörld"], SamplingParams(max_new_tokens=30), on_token=events.append)[0]
    assert tuple(token for event in events for token in event.token_ids) == result.token_ids
    assert "".join(event.text for event in events) == result.text
    assert [event.finished for event in events] == [False] * (len(events) - 1) + [True]
    assert result.text == engine.tokenizer.decode(result.token_ids, skip_special_tokens=True)


def test_stop_string_cuts_the_text(llama):
    engine = Engine(llama, byte_tokenizer(), num_pages=100)
    params = SamplingParams(max_new_tokens=40, temperature=0.5, seed=1)
    whole = engine.generate(["tell me"], params)[0].text
    middle = len(whole) // 2
    stop = next(whole[i : i + 2] for i in range(middle, len(whole)) if "�" not in whole[i : i + 2])
    events = []
    params = SamplingParams(max_new_tokens=40, temperature=0.5, seed=1, stop=(stop,))
    result = engine.generate(["tell me"], params, on_token=events.append)[0]
    assert (result.finish_reason, result.text) == ("stop", whole[: whole.index(stop)])
    assert "".join(event.text for event in events) == result.text


def test_prompts_as_text_ids_and_messages(llama):
    tokenizer = byte_tokenizer()
    engine = Engine(llama, tokenizer, num_pages=100)
    text = engine.submit("user: hi\nassistant: ", SamplingParams(4))
    ids = engine.submit(torch.tensor(text.prompt_ids), SamplingParams(4))
    messages = engine.submit([{"role": "user", "content": "hi"}], SamplingParams(4))
    engine.run()
    assert (
        text.prompt_ids
        == ids.prompt_ids
        == messages.prompt_ids
        == tuple(tokenizer("user: hi\nassistant: ")["input_ids"])
    )
    assert text.token_ids == ids.token_ids == messages.token_ids


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], ValueError, "at least one token"),
        ([1, VOCAB_SIZE], ValueError, "token ids in 0..257"),
        ([-1], ValueError, "token ids in 0..257"),
        ("text", ValueError, "must be token ids for an engine without a tokenizer, got text"),
        ([{"role": "user", "content": "x"}], ValueError, "got chat messages"),
        ([1.5], TypeError, "prompt must be text, token ids or chat messages, got one float in it"),
        (7, TypeError, "prompt must be text, token ids or chat messages, got int"),
    ],
)
def test_submit_refuses(llama, prompt, error, words):
    engine = Engine(llama, num_pages=10)
    with pytest.raises(error, match=words):
        engine.submit(prompt)
    assert not engine.has_work


def test_submit_refuses_stop_strings_without_tokenizer_and_a_closed_engine(llama):
    engine = Engine(llama, num_pages=10)
    with pytest.raises(ValueError, match=r"params.stop must be empty for an engine without a tokenizer"):
        engine.submit([1], SamplingParams(stop=("x",)))
    with pytest.raises(TypeError, match="params must be SamplingParams, got dict"):
        engine.submit([1], {})
    with engine:
        request = engine.submit([1])
    assert request.finish_reason == "cancelled"
    with pytest.raises(ValueError, match="engine must be open for submit"):
        engine.submit([1])


def test_generate_with_one_bad_prompt_leaves_nothing_behind(llama):
    engine = Engine(llama, num_pages=10)
    with pytest.raises(ValueError, match="at least one token"):
        engine.generate([[1, 2], []])
    with pytest.raises(ValueError, match=r"params must be one or 1 \(one a prompt\), got 2"):
        engine.generate([[1, 2]], [SamplingParams(), SamplingParams()])
    assert_nothing_is_left(engine)


def test_requests_from_other_threads(llama, expected):
    engine = Engine(llama, page_size=4, num_pages=100)
    requests = [None] * len(PROMPTS)

    def submit(number):
        requests[number] = engine.submit(PROMPTS[number], SamplingParams(NUM_TOKENS))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    while any(request is None or not request.finished for request in requests):
        engine.step()
    for thread in threads:
        thread.join()
    assert_greedy(llama, [request.result() for request in requests], expected)


def test_result_before_the_end_is_refused(llama):
    request = Engine(llama, num_pages=10).submit([1])
    with pytest.raises(ValueError, match="request 0 must be finished to have a result, got status 'waiting'"):
        request.result()


def test_stats_and_reset(llama):
    engine = Engine(llama, page_size=4, num_pages=50)
    results = engine.generate([PROMPTS[1]], SamplingParams(5))
    stats = engine.stats()
    assert (stats.num_requests, stats.num_finished, stats.num_prompt_tokens) == (1, 1, len(PROMPTS[1]))
    assert (stats.num_prefill_tokens, stats.num_decode_tokens, stats.num_steps) == (len(PROMPTS[1]), 4, 5)
    assert stats.prefill_tokens_per_s > 0
    assert stats.decode_tokens_per_s > 0
    assert stats.num_pages_used == 0
    assert stats.num_pages_cached + stats.num_pages_free == stats.num_pages == 50
    assert stats.peak_pages_used == -(-(len(PROMPTS[1]) + 4) // 4)
    assert stats.pool_bytes == engine.pool.num_bytes
    timings = results[0].timings
    assert 0 <= timings.queue_s <= timings.first_token_s <= timings.total_s
    engine.reset_stats()
    assert (engine.stats().num_steps, engine.stats().peak_pages_used) == (0, 0)
    engine.clear_prefix_cache()
    assert engine.stats().num_pages_free == 50


def test_engine_refuses_a_model_that_cannot_run_over_pages_before_it_takes_memory():
    config_model = tiny_model("gemma3", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModelError, match="must be True|plainly causal"):
        Engine(config_model)


@pytest.mark.parametrize("option", ["max_batch_tokens", "max_num_seqs", "num_pages", "page_size"])
def test_engine_refuses_options_out_of_range(llama, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        Engine(llama, **{option: 0})


def test_default_pool_is_for_whole_contexts(llama):
    assert Engine(llama, max_num_seqs=3).pool.num_pages == 3 * 256 // 16
