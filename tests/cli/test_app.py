"""The commands as a user calls them: what they print, and one readable line when something is wrong."""

import pytest
import torch
from typer.testing import CliRunner

from pagedkv.cli.app import app
from pagedkv.cli.workload import chat_prompt_ids
from pagedkv.integrations.transformers.checkpoint import load_causal_lm


@pytest.fixture
def invoke(monkeypatch):
    # The variable HF_HUB_OFFLINE was read long ago, at import.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    runner = CliRunner()
    return lambda *arguments, **options: runner.invoke(app, list(map(str, arguments)), **options)


def failure(result):
    """The one line of a command that failed as it should."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_size_of_a_directory(invoke, tiny_model_dir):
    result = invoke("size", "--model", tiny_model_dir, "--memory", "1MiB", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "2 KV heads x 16, 2 layers" in result.stdout
    assert "pages in 1.0 MiB             256" in result.stdout


def test_size_of_a_quantised_cache(invoke, tiny_model_dir):
    result = invoke("size", "--model", tiny_model_dir, "--dtype", "int8")
    assert result.exit_code == 0, result.output
    assert "dtype                        int8, and a float32 scale for each token and head" in result.stdout
    assert "bytes per token              160 (160 B)" in result.stdout  # 2 layers, K and V, 2 heads, 16 + 4 bytes


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "geometry must be --model, or all of"),
        (("--model", "m", "--layers", 3), "got both"),
        (("--model", "/does/not/exist"), "must be a directory that exists or a Hugging Face id, got '/does/not/exist'"),
        (("--model", "nobody/nothing"), "must have a config that can be read, got 'nobody/nothing'"),
        (("--layers", 2, "--kv-heads", 2, "--head-dim", 8, "--memory", "lots"), "memory must be a number"),
        (("--layers", 2, "--kv-heads", 2, "--head-dim", 8, "--tp", 3), "tp_size must divide"),
    ],
)
def test_size_with_bad_arguments(invoke, arguments, words):
    assert words in failure(invoke("size", *arguments))


def test_traceback_on_demand(invoke, monkeypatch):
    monkeypatch.setenv("PAGEDKV_TRACEBACK", "1")
    assert isinstance(invoke("size").exception, ValueError)


def test_info_names_what_runs_here(invoke):
    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert f"torch               {torch.__version__}" in result.stdout
    assert f"threads             {torch.get_num_threads()} of" in result.stdout
    assert "back end cpu" in result.stdout


def test_generate_streams_the_answer_of_the_model(invoke, tiny_model_dir):
    loaded = load_causal_lm(tiny_model_dir)
    ids = torch.tensor([chat_prompt_ids(loaded.tokenizer, "When does the ferry sail?", "Be brief.")])
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    result = invoke(
        "generate", "When does the ferry sail?", "--system", "Be brief.", "-m", tiny_model_dir, "--max-new-tokens", 12
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{expected}\n"
    assert expected


def test_generate_sampled_with_a_seed_repeats(invoke, tiny_model_dir):
    arguments = ("generate", "-", "-m", tiny_model_dir, "--raw", "--temperature", 1.5, "--max-new-tokens", 16)
    first, again, other = (invoke(*arguments, "--seed", seed, input="The tower") for seed in (3, 3, 4))
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout != other.stdout


def test_generate_ends_before_the_stop_string(invoke, tiny_model_dir):
    arguments = ("generate", "The lamp", "--raw", "-m", tiny_model_dir, "--max-new-tokens", 16)
    whole = invoke(*arguments).stdout.rstrip("\n")
    stop = whole[len(whole) // 2 :][:3]
    assert invoke(*arguments, "--stop", stop).stdout == f"{whole[: whole.index(stop)]}\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((" ",), "prompt must have text, got nothing"),
        (("hello", "--raw", "--system", "x"), "--system must not come with --raw"),
        (("hello", "--top-p", 0), "top_p must be above 0"),
        (("word " * 5000,), "prompt must have at most 4096 tokens"),
    ],
)
def test_generate_with_bad_arguments(invoke, tiny_model_dir, arguments, words):
    assert words in failure(invoke("generate", *arguments, "-m", tiny_model_dir))


def test_generate_with_an_unknown_model(invoke):
    line = failure(invoke("generate", "hello", "-m", "nobody/nothing"))
    assert "that can be loaded, got 'nobody/nothing'" in line


def test_interrupt_is_one_line(invoke, monkeypatch):
    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedkv.cli.app.parse_bytes", interrupted)
    result = invoke("size", "--memory", "1GiB")
    assert result.exit_code == 130
    assert result.stderr.strip() == "pagedkv: interrupted."


def test_demo_reports_requests_that_failed(invoke, tiny_model_dir):
    result = invoke("demo", "-m", tiny_model_dir, "-n", 2, "--num-pages", 3, "--no-compare", "--max-new-tokens", 4)
    assert failure(result) == "pagedkv: 2 of 2 requests ended in an error."
    assert "prompt must have at most 48 tokens" in result.stdout
