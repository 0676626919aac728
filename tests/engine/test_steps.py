"""A step is reserved in one call and committed in another; when it comes to nothing, nothing is held."""

import itertools

import pytest
import torch

from pagedkv import OutOfPagesError
from pagedkv.engine import Engine, SamplingParams
from pagedkv.management import KVCacheManager, check_integrity
from pagedkv.management.sequence import Sequence
from pagedkv.testing.beams import prompt_of
from pagedkv.testing.tiny_models import tiny_model

PROMPTS = [prompt_of(length, seed).tolist() for seed, length in enumerate((9, 14, 6, 21))]
PARAMS = [
    SamplingParams(max_new_tokens=12),
    SamplingParams(max_new_tokens=12, temperature=1.0, seed=1, n=3),
    SamplingParams(max_new_tokens=12, num_beams=3),
    SamplingParams(max_new_tokens=12, temperature=0.7, seed=2),
]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(llama):
    """What the mixed requests get one by one, with room for all."""
    return [
        tokens_of(Engine(llama, num_pages=100).generate([prompt], params)[0])
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]


def tokens_of(result):
    return [continuation.token_ids for continuation in result.continuations]


def submit_all(engine):
    return [engine.submit(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.fixture
def calls(monkeypatch):
    """The public calls that were made of managers and sequences, in order."""
    made = []

    def spy_on(owner, name):
        inner = getattr(owner, name)

        def spy(self, *args, **kwargs):
            made.append(name)
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    for name in ("batch", "can_batch", "commit", "page_table", "stats", "open", "reorder"):
        spy_on(KVCacheManager, name)
    for name in ("append", "try_append", "can_append", "truncate", "fork", "close"):
        spy_on(Sequence, name)
    commit_one = Sequence.commit
    monkeypatch.setattr(Sequence, "commit", lambda seq, ids: (made.append("commit one"), commit_one(seq, ids)))
    return made


def test_a_step_of_decoding_is_one_call_to_reserve_and_one_to_commit(llama, calls):
    engine = Engine(llama, page_size=4, num_pages=100)
    for seed in range(7):
        engine.submit(prompt_of(5 + seed, seed).tolist(), SamplingParams(max_new_tokens=40))
    engine.step()
    for _ in range(9):  # over the border of a page of each
        calls.clear()
        assert engine.step().num_decode_tokens == 7
        assert calls == ["batch", "commit"]


def test_a_step_of_chunks_and_decoding_is_reserved_in_one_call_too(llama, calls):
    engine = Engine(llama, page_size=4, num_pages=100, max_batch_tokens=8)
    for prompt in PROMPTS[:2]:
        engine.submit(prompt, SamplingParams(max_new_tokens=20))
    engine.step()
    engine.step()
    engine.submit(PROMPTS[2], SamplingParams(max_new_tokens=20))
    calls.clear()
    report = engine.step()
    assert (report.num_decode_tokens, report.num_prefill_tokens) == (1, 7)
    assert calls == ["batch", "commit", "commit one"]
    calls.clear()
    report = engine.step()
    assert (report.num_decode_tokens, report.num_prefill_tokens) == (2, 6)
    assert calls.count("batch") == calls.count("open") == 1
    assert "try_append" not in calls


@pytest.mark.parametrize("params", [PARAMS[1], PARAMS[2]], ids=["samples", "beams"])
def test_forks_that_write_into_one_page_are_copied_in_one_call(llama, params, monkeypatch):
    engine = Engine(llama, page_size=4, num_pages=60)
    copy_pages, copied = engine.pool.copy_pages, []
    monkeypatch.setattr(engine.pool, "copy_pages", lambda src, dst: (copied.append(src.tolist()), copy_pages(src, dst)))
    request = engine.submit(PROMPTS[1], params)
    engine.submit(PROMPTS[0], params)
    engine.step()
    assert copied == []
    engine.step()
    assert [len(pages) for pages in copied] == [4]  # two of three forks of each request
    assert len(set(copied[0])) == 2
    engine.run()
    assert tokens_of(request.result()) == tokens_of(Engine(llama, num_pages=60).generate([PROMPTS[1]], params)[0])


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("max_batch_tokens", [6, 13, 2048])
@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 72), (4, 21), (4, 30), (16, 9)])
def test_answers_under_tight_pools_are_those_of_a_roomy_one(
    llama, expected, page_size, num_pages, max_batch_tokens, prefix_cache
):
    engine = Engine(
        llama,
        page_size=page_size,
        num_pages=num_pages,
        max_batch_tokens=max_batch_tokens,
        prefix_cache=prefix_cache,
    )
    results = engine.generate(PROMPTS, PARAMS)
    assert [tokens_of(result) for result in results] == expected
    assert engine.manager.stats().num_sequences == 0
    check_integrity(engine.manager)


def test_preemption_asks_again_for_those_that_are_left(llama, calls):
    engine = Engine(llama, page_size=4, num_pages=9, prefix_cache=False)
    requests = [engine.submit(prompt_of(6, seed).tolist(), SamplingParams(max_new_tokens=20)) for seed in range(3)]
    numbers = set()
    while engine.has_work:
        calls.clear()
        report = engine.step()
        numbers.add((len(report.preempted), calls.count("batch")))
    assert numbers == {(0, 1), (1, 2)}
    roomy = Engine(llama, num_pages=50).generate([request.prompt_ids for request in requests], SamplingParams(20))
    assert [request.result().token_ids for request in requests] == [result.token_ids for result in roomy]


@pytest.mark.parametrize("where", ["forward", "commit"])
@pytest.mark.parametrize("num_steps", range(6))
def test_a_step_that_fails_leaves_every_sequence_as_it_was(llama, expected, monkeypatch, num_steps, where):
    engine = Engine(llama, page_size=4, num_pages=100, max_batch_tokens=16)
    requests = submit_all(engine)
    for _ in range(num_steps):
        engine.step()

    def lengths():
        live = [each for request in requests for each in request.live]
        return [0 if each.seq is None or each.num_computed == 0 else each.seq.num_tokens for each in live]

    def fail(*_):
        raise KeyboardInterrupt

    before = lengths()
    handle = llama.model.layers[1].register_forward_pre_hook(fail if where == "forward" else lambda *_: None)
    if where == "commit":
        monkeypatch.setattr(KVCacheManager, "commit", fail)
        monkeypatch.setattr(Sequence, "commit", fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    finally:
        handle.remove()
    monkeypatch.undo()
    # Those that were admitted in the step have what they found in the prefix cache.
    assert [after for after, old in zip(lengths(), before, strict=True) if old] == [old for old in before if old]
    for request in requests:
        assert all(each.seq is None or each.seq.num_tokens == each.num_computed for each in request.live)
    check_integrity(engine.manager)
    engine.run()
    for request, tokens in zip(requests, expected, strict=True):
        # What was sampled is lost with the commit, and its random number with it.
        assert (where == "commit" and request.params.temperature) or tokens_of(request.result()) == tokens


def test_an_error_of_one_is_found_among_all_with_the_others_slots_given_back(llama, expected):
    """The pass over all fails, then each request has one of its own, on the same pages."""
    engine, fails = Engine(llama, page_size=4, num_pages=100), itertools.count()
    requests = submit_all(engine)
    for _ in range(3):
        engine.step()

    def fail_once(*_):
        if next(fails) == 0:
            raise RuntimeError("planted")

    handle = llama.model.layers[1].register_forward_pre_hook(fail_once)
    used = engine.manager.stats().owned
    try:
        engine.step()
    finally:
        handle.remove()
    assert next(fails) == 1 + len(requests)
    assert engine.manager.stats().owned - used <= sum(len(request.live) for request in requests)
    engine.run()
    assert [tokens_of(request.result()) for request in requests] == expected


@pytest.mark.parametrize(("num_pages", "num_running"), [(5, 1), (6, 2), (8, 2), (9, 3), (11, 3), (12, 4)])
def test_pages_of_all_that_are_admitted_in_a_step_are_counted_together(llama, num_pages, num_running):
    """Two pages each, and one to grow once there are several."""
    engine = Engine(llama, page_size=4, num_pages=num_pages, prefix_cache=False)
    for seed in range(4):
        engine.submit(prompt_of(8, seed).tolist(), SamplingParams(max_new_tokens=4))
    assert engine.step().num_running == num_running
    engine.run()
    assert engine.stats().num_preemptions == 0


@pytest.mark.parametrize(("num_pages", "num_running"), [(7, 1), (8, 2)])
def test_evictable_pages_are_counted_once_among_those_that_find_them(llama, num_pages, num_running):
    """Two prompts that begin with the same four cached pages: those, one more each and one to grow each."""
    engine = Engine(llama, page_size=4, num_pages=num_pages)
    shared = prompt_of(16, 9).tolist()
    engine.generate([shared], SamplingParams(max_new_tokens=2))
    assert engine.stats().num_pages_cached == 4
    for seed in range(2):
        engine.submit([*shared, *prompt_of(4, seed).tolist()], SamplingParams(max_new_tokens=1))
    report = engine.step()
    assert report.num_prefill_tokens == num_running * 4
    assert not report.preempted


@pytest.mark.parametrize(("num_pages", "num_running"), [(12, 1), (13, 2)])
def test_pages_that_forks_are_about_to_copy_are_not_given_to_others(llama, num_pages, num_running):
    """Four pages of the prompt, three copies of the last, one for each of four to grow; two for the one that comes."""
    engine = Engine(llama, page_size=4, num_pages=num_pages, prefix_cache=False)
    engine.submit(prompt_of(13, 0).tolist(), SamplingParams(max_new_tokens=3, temperature=1.0, n=4))
    engine.step()
    engine.submit(prompt_of(4, 1).tolist(), SamplingParams(max_new_tokens=3))
    assert engine.step().num_running == num_running
    engine.run()
    assert engine.stats().num_preemptions == 0


def test_pages_that_somebody_took_since_the_admission_are_made_good(llama, monkeypatch):
    prompts = [prompt_of(8, seed).tolist() for seed in range(3)]
    expected = Engine(llama, num_pages=50).generate(prompts, SamplingParams(max_new_tokens=4))
    engine = Engine(llama, page_size=4, num_pages=12)
    batch, refusals = engine.manager.batch, itertools.count()

    def refuse_once(*args):
        if next(refusals) == 0:
            raise OutOfPagesError(6, 4, 0, 8, 4)
        return batch(*args)

    monkeypatch.setattr(engine.manager, "batch", refuse_once)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=4))
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert [result.num_preemptions for result in results] == [0, 0, 1]
    assert engine.stats().num_prompt_tokens == 24  # each once


def test_a_copy_that_fails_leaves_nothing_reserved_and_nobody_admitted(llama, monkeypatch):
    engine = Engine(llama, page_size=4, num_pages=60)
    params = SamplingParams(max_new_tokens=5, temperature=1.0, seed=1, n=3)
    request = engine.submit(PROMPTS[1], params)
    engine.step()
    late = engine.submit(PROMPTS[0], params)
    before = engine.manager.stats()

    def fail(src, dst):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(engine.pool, "copy_pages", fail)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    after = engine.manager.stats()
    assert (after.free, after.num_sequences, after.tokens) == (before.free, before.num_sequences, before.tokens)
    assert (late.status, engine.num_running) == ("waiting", 1)
    check_integrity(engine.manager)
    monkeypatch.undo()
    engine.run()
    roomy = Engine(llama, num_pages=60).generate([PROMPTS[1], PROMPTS[0]], params)
    assert [tokens_of(each.result()) for each in (request, late)] == [tokens_of(result) for result in roomy]
    assert engine.stats().num_prompt_tokens == len(PROMPTS[0]) + len(PROMPTS[1])


@pytest.mark.parametrize("num_closed", [0, 1, 2])
def test_an_interrupt_while_pages_are_given_back_is_made_good(llama, expected, monkeypatch, num_closed):
    engine, calls = Engine(llama, page_size=4, num_pages=100), itertools.count()
    requests = submit_all(engine)
    for _ in range(4):
        engine.step()
    close = Sequence.close

    def interrupted(seq):
        close(seq)
        if next(calls) == num_closed:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sequence, "close", interrupted)
    monkeypatch.setattr(KVCacheManager, "batch", refuse)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    engine.run()
    assert [tokens_of(request.result()) for request in requests] == expected
    assert engine.manager.stats().num_sequences == 0


def refuse(*_):
    raise OutOfPagesError(1, 0, 0, 100, 8)


@pytest.mark.parametrize("num_pages", [30, 100])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1], [2], [3, 3]], ids=["mixed", "samples", "beams", "same prompt"])
def test_peaks_are_those_of_the_pages_in_each_step(llama, monkeypatch, chosen, num_pages):
    engine = Engine(llama, page_size=4, num_pages=num_pages, max_batch_tokens=16)
    schedule, seen = engine._scheduler.schedule, []

    def scheduled():
        scheduled = schedule()
        seen.append(engine.manager.stats())
        return scheduled

    monkeypatch.setattr(engine._scheduler, "schedule", scheduled)
    for _ in range(2):
        engine.generate([PROMPTS[number] for number in chosen], [PARAMS[number] for number in chosen])
        stats = engine.stats()
        assert stats.peak_pages_used == max(pages.owned for pages in seen)
        assert stats.peak_pages_shared == max(pages.shared for pages in seen) > 0
