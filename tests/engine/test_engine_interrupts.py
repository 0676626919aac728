"""An engine whose steps are ended by an interrupt at each bytecode in turn, and what the next steps make of it."""

import os
from pathlib import Path

import pytest

import pagedkv.engine
from pagedkv import check_integrity
from pagedkv.engine import Engine, SamplingParams, answers, beam_group, beam_search, continuation, scheduler
from pagedkv.management.manager import KVCacheManager
from pagedkv.testing.interrupts import Interrupter
from pagedkv.testing.tiny_models import byte_tokenizer, tiny_model

FILES = Path(pagedkv.engine.__file__).parent
# How many bytecodes lie between two interrupts; 1 for all of them.
STRIDE = int(os.environ.get("PAGEDKV_INTERRUPT_STRIDE", "13"))
GREEDY, BEAMS = SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=4, num_beams=3, num_return_sequences=3)


def interrupter_in(code, number, num_skipped=0):
    """Of the bytecodes of one piece of code, its first calls left out."""
    return Interrupter(number, lambda called: called is code, num_skipped)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def outcome(requests):
    results = [request.result() for request in requests]
    return [
        (each.finish_reason, each.token_ids, each.text, pytest.approx(each.score))
        for result in results
        for each in result.continuations
    ]


def go_on(engine):
    """Steps until all is done, but not for ever."""
    for _ in range(100):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("the engine must end its requests")


def assert_made_good(build, code, stride=STRIDE, num_skipped=0):
    """What an interrupt anywhere in `code` leaves is taken up, and every page comes back."""
    engine, requests, heard = build()
    engine.run()
    expected, told, number = outcome(requests), [list(events) for events in heard], 0
    while True:
        engine, requests, heard = build()
        interrupter = interrupter_in(code, number, num_skipped)
        try:
            with interrupter:
                engine.run()
        except KeyboardInterrupt:
            pass
        go_on(engine)
        assert outcome(requests) == expected, number
        for events, all_events in zip(heard, told, strict=True):
            # The last event is told at most once; nothing comes twice or in another order.
            assert "".join(all_events).startswith("".join(events)), number
        check_integrity(engine.manager)
        engine.close()
        assert engine.manager.num_free_pages == engine.manager.num_pages, number
        if not interrupter.has_struck:
            break
        number += stride
    assert number > stride


def builder(model, prompts, params, num_pages=60, **options):
    def build():
        engine = Engine(model, byte_tokenizer(), num_pages=num_pages, page_size=2, **options)
        heard = [[] for _ in prompts]
        requests = [
            engine.submit(prompt, params, on_token=lambda event, events=events: events.append(event.text))
            for prompt, events in zip(prompts, heard, strict=True)
        ]
        return engine, requests, heard

    return build


ANSWERS, TEXT = answers.Answers, continuation.Continuation
PIECES = {
    "accept": (ANSWERS._accept_token, 0),
    "accept the last": (ANSWERS._accept_token, 4),
    "push": (TEXT.push, 2),
    "push the last": (TEXT.push, 4),
    "push text": (pagedkv.engine.text.TextStream.push, 2),
    "weigh": (TEXT.weigh, 1),
    "end": (ANSWERS._end, 0),
    "close text": (ANSWERS._close_text, 0),
    "remove": (scheduler.Scheduler.remove, 0),
    "give pages back": (pagedkv.engine.request.Request.give_pages_back, 0),
    "note the end": (Engine._note_end, 0),
    "admit": (scheduler.Scheduler._admit, 0),
    "schedule": (scheduler.Scheduler.schedule, 1),
    "step": (Engine._step, 1),
    "execute": (Engine._execute, 1),
}


@pytest.mark.parametrize("name", PIECES)
def test_an_interrupt_anywhere_keeps_tokens_and_texts(llama, name):
    function, num_skipped = PIECES[name]
    build = builder(llama, [[1, 2, 3], [1, 2, 3, 4, 5]], GREEDY)
    assert_made_good(build, function.__code__, 5 if len(function.__code__.co_code) < 400 else STRIDE, num_skipped)


BEAM_PIECES = {
    "step": beam_search.BeamSearch.step,
    "reorder": KVCacheManager.reorder.__wrapped__,
    "advance": beam_group.advance_beams,
    "take tokens": beam_group.take_tokens,
    "end": ANSWERS._end_search,
    "found": beam_group.found_endings,
}


@pytest.mark.parametrize("name", BEAM_PIECES)
def test_an_interrupt_anywhere_keeps_beams(llama, name):
    assert_made_good(builder(llama, [[1, 2, 3]], BEAMS), BEAM_PIECES[name].__code__, 2 * STRIDE)


@pytest.mark.parametrize("when", range(1, 7))
def test_an_interrupt_after_a_page_was_filled_needs_no_page_more(llama, monkeypatch, when):
    params = SamplingParams(max_new_tokens=50)
    expected = Engine(llama, num_pages=4, page_size=2).generate([[1, 2, 3]], params)[0].token_ids
    engine = Engine(llama, num_pages=4, page_size=2)
    request, run, calls = engine.submit([1, 2, 3], params), engine._runner.run, []

    def interrupted(*args):
        output = run(*args)
        calls.append(args)
        if len(calls) == when:
            raise KeyboardInterrupt
        return output

    monkeypatch.setattr(engine._runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    go_on(engine)
    assert (request.error, request.result().token_ids) == (None, expected)


@pytest.mark.parametrize("ended_by", ["cancel", "close"])
def test_an_interrupted_end_from_outside_is_made_good(llama, ended_by):
    for params in (GREEDY, BEAMS):
        number, has_struck = 0, True
        while has_struck:
            engine, (first, second), _ = builder(llama, [[1, 2, 3], [4, 5, 6]], params)()
            engine.step()
            interrupter = interrupter_in(ANSWERS._end.__code__, number)
            try:
                with interrupter:
                    engine.cancel(first) if ended_by == "cancel" else engine.close()
            except KeyboardInterrupt:
                pass
            has_struck, number = interrupter.has_struck, number + 5
            if ended_by == "cancel":
                go_on(engine)
                assert first.finished
                assert second.finish_reason == "length"
            engine.close()
            assert (first.finished, second.finished, engine.has_work) == (True, True, False)
            assert engine.manager.num_free_pages == 60
