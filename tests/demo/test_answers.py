"""The real model, float32: all 16 answers over shared pages equal those of model.generate, one request at a time."""

import pytest

from pagedkv import check_integrity
from pagedkv.cli.baseline import run_generate
from pagedkv.cli.measure import run_engine
from pagedkv.engine import Engine
from pagedkv.testing.greedy import first_greedy_difference

MAX_NEW_TOKENS = 24


def with_eos(token_ids, is_stopped, model):
    return [*token_ids, model.generation_config.eos_token_id] if is_stopped else list(token_ids)


@pytest.mark.slow
def test_greedy_answers_equal_those_of_generate(demo_model, demo_prompts):
    model = demo_model.model
    with Engine(model, demo_model.tokenizer, num_pages=256) as engine:
        run = run_engine(engine, demo_prompts, MAX_NEW_TOKENS)
        check_integrity(engine.manager)
    differences = []
    for prompt, result in zip(demo_prompts, run.results, strict=True):
        alone = run_generate(model, [prompt], MAX_NEW_TOKENS).answers[0]
        ours = with_eos(result.token_ids, result.finish_reason == "stop", model)
        theirs = with_eos(alone, len(alone) < MAX_NEW_TOKENS, model)
        found = first_greedy_difference(model, prompt, ours, theirs)
        if found is not None:
            print(f"request {result.request_id}, {found}")
            differences.append(found)
    assert all(found.is_tie for found in differences), "\n".join(map(str, differences))
    # A tie is possible at one token of many; answers that part often were not made by the same arithmetic.
    assert len(differences) <= 1
    assert run.stats.num_cached_tokens > 15 * 1100


@pytest.mark.slow
def test_answers_are_about_the_handbook(demo_model, demo_prompts):
    """The shared pages carry meaning: the model reads the number of steps out of the prefix it did not compute."""
    with Engine(demo_model.model, demo_model.tokenizer, num_pages=256) as engine:
        run = run_engine(engine, demo_prompts[:2], MAX_NEW_TOKENS)
    assert run.results[1].num_cached_tokens > 1100
    assert "187" in run.results[1].text
