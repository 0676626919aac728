"""The demo on a small model: its figures agree with what ran, and its answers with model.generate."""

import io
import re

import pytest
import torch
from rich.console import Console

from pagedkv.cli.baseline import run_generate
from pagedkv.cli.demo import DemoOptions, run_demo
from pagedkv.cli.measure import run_engine
from pagedkv.cli.quiet import quiet_transformers
from pagedkv.cli.report import count_equal_answers
from pagedkv.cli.workload import chat_messages, chat_prompt_ids, demo_requests
from pagedkv.engine import Engine
from pagedkv.integrations.transformers.checkpoint import load_causal_lm

NUM_REQUESTS, MAX_NEW_TOKENS = 4, 6


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    with quiet_transformers():
        return load_causal_lm(tiny_model_dir)


@pytest.fixture(scope="module")
def prompts(loaded):
    return [request.prompt_ids for request in demo_requests(loaded.tokenizer, NUM_REQUESTS)]


@pytest.fixture(scope="module")
def measured(loaded, prompts):
    """The same prompts through the engine and through model.generate."""
    with Engine(loaded.model, loaded.tokenizer, num_pages=256) as engine:
        run = run_engine(engine, prompts, MAX_NEW_TOKENS)
    return run, run_generate(loaded.model, prompts, MAX_NEW_TOKENS)


def test_requests_share_the_handbook_and_differ_in_length(loaded):
    requests = demo_requests(loaded.tokenizer)
    handbook = chat_prompt_ids(loaded.tokenizer, "", "")
    assert len(requests) == 16
    assert len({len(request.prompt_ids) for request in requests}) > 8
    shared = next(
        at for at, ids in enumerate(zip(*(r.prompt_ids for r in requests), strict=False)) if len(set(ids)) > 1
    )
    assert shared > 1000 > len(handbook)
    assert demo_requests(loaded.tokenizer, 17)[16] == requests[0]


def test_tokenizer_without_chat_template_gets_text(loaded, monkeypatch):
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    ids = chat_prompt_ids(loaded.tokenizer, "Why?", "Be kind.")
    assert loaded.tokenizer.decode(ids) == "Be kind.\n\nQuestion: Why?\nAnswer:"


def test_chat_messages_without_system():
    assert chat_messages("Why?") == [{"role": "user", "content": "Why?"}]


def test_answers_equal_those_of_generate(measured):
    run, baseline = measured
    assert [result.token_ids for result in run.results] == list(baseline.answers)
    assert count_equal_answers(run, baseline) == NUM_REQUESTS


def test_counters_are_of_this_run(measured, prompts):
    stats = measured[0].stats
    num_prompt_tokens = sum(map(len, prompts))
    assert stats.num_prompt_tokens == num_prompt_tokens == measured[1].num_prompt_tokens
    assert stats.num_cached_tokens + stats.num_prefill_tokens == num_prompt_tokens
    assert stats.num_cached_tokens > (NUM_REQUESTS - 1) * 1000
    assert stats.num_decode_tokens == measured[1].num_decode_tokens
    assert stats.peak_pages_shared * stats.page_size > 1000


def test_contiguous_caches_hold_what_dynamic_caches_hold(loaded, measured, prompts):
    """One request alone: transformers' own cache, unpadded, is the measure of what a contiguous cache takes."""
    run, _ = measured
    alone = [run_generate(loaded.model, [prompt], MAX_NEW_TOKENS) for prompt in prompts]
    assert run.contiguous_bytes == sum(each.cache_bytes for each in alone)
    assert run.peak_bytes < run.contiguous_bytes


def test_generate_counts_padding_out_of_tokens_and_into_memory(loaded, measured, prompts):
    baseline = measured[1]
    spec_bytes = 2 * 2 * 16 * 2 * 4  # layers, heads, head dim, K and V, float32
    longest = max(map(len, prompts))
    num_steps = baseline.cache_bytes // (len(prompts) * spec_bytes) - longest
    assert 0 < num_steps < MAX_NEW_TOKENS
    assert baseline.num_decode_tokens <= len(prompts) * num_steps
    assert baseline.prefill_s > 0
    assert baseline.decode_s > 0


def test_generate_stops_counting_at_eos(loaded, monkeypatch, prompts):
    whole = run_generate(loaded.model, prompts[:1], MAX_NEW_TOKENS).answers[0]
    position = next(at for at in range(1, len(whole)) if whole[at] not in whole[:at])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", whole[position])
    cut = run_generate(loaded.model, prompts[:1], MAX_NEW_TOKENS)
    assert cut.answers[0] == whole[:position]
    assert cut.num_decode_tokens == position


def test_demo_prints_what_was_measured(tiny_model_dir):
    out = io.StringIO()
    options = DemoOptions(str(tiny_model_dir), num_requests=3, max_new_tokens=4, num_pages=256)
    assert run_demo(options, Console(file=out, width=110)) == 0
    text = " ".join(out.getvalue().split())
    for words in (
        "tiny-llama: 3 chat requests of",
        "pool of 256 pages of 16 tokens, float32",
        "[3/3] request",
        "1. When are you open?",
        "3 in ",
        "computed tokens/s",
        "prefix hit rate",
        "tokens not recomputed",
        "used at the peak",
        "3 contiguous caches",
        "beside model.generate",
        "equal answers: 3 of 3, token for token",
    ):
        assert words in text, words
    hits, asked = re.search(r"tokens not recomputed ([\d,]+) of ([\d,]+)", text).groups()
    rate = int(hits.replace(",", "")) / int(asked.replace(",", ""))
    assert f"prefix hit rate {rate:.1%}" in text


@pytest.mark.parametrize("dtype", ["float16", "int8", "float8_e4m3fn"])
def test_demo_without_comparison_over_pages_of_another_dtype(tiny_model_dir, dtype):
    out = io.StringIO()
    options = DemoOptions(
        str(tiny_model_dir),
        num_requests=2,
        max_new_tokens=3,
        num_pages=256,
        kv_dtype=getattr(torch, dtype),
        compares=False,
    )
    assert run_demo(options, Console(file=out, width=110)) == 0
    assert f"pool of 256 pages of 16 tokens, {dtype};" in " ".join(out.getvalue().split())
    assert "generate" not in out.getvalue()


def test_demo_on_a_terminal_draws_a_table(tiny_model_dir):
    out = io.StringIO()
    options = DemoOptions(str(tiny_model_dir), num_requests=2, max_new_tokens=3, num_pages=256, compares=False)
    console = Console(file=out, width=110, force_terminal=True, _environ={"TERM": "xterm"})
    assert run_demo(options, console) == 0
    assert "running" in out.getvalue()
    assert "[1/2]" not in out.getvalue()
