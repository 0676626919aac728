"""The report says which answers differ and where, and shows errors in the place of answers."""

import io
from types import SimpleNamespace

from rich.console import Console

from pagedkv.cli.baseline import BaselineRun
from pagedkv.cli.measure import EngineRun
from pagedkv.cli.report import print_answers, print_comparison


def result(token_ids, **changes):
    fields = {"prompt_ids": (1,) * 8, "text": "some\n text", "finish_reason": "length", "error": None}
    return SimpleNamespace(token_ids=token_ids, **(fields | changes))


def printed(function, *arguments):
    out = io.StringIO()
    function(Console(file=out, width=120), *arguments)
    return out.getvalue()


def test_comparison_names_requests_that_differ():
    stats = SimpleNamespace(
        prefill_s=1.0, decode_s=2.0, decode_tokens_per_s=30.0, peak_pages_used=4, page_size=16, num_finished=3
    )
    run = EngineRun((result((1, 2)), result((1, 2, 3)), result((4,))), stats, 3.0, 1024)
    baseline = BaselineRun(((1, 2), (1, 2, 4), (4, 5)), 24, 10, 4.0, 1.0, 2**20)
    text = " ".join(printed(print_comparison, run, baseline).split())
    assert "equal answers: 1 of 3" in text
    assert "request 2 differs from token 3 on" in text
    assert "request 3 differs from token 2 on" in text
    assert "prefill, s 1.00 4.00 4.0x less" in text
    assert "decode, tokens/s 30.0 10.0 3.0x" in text
    assert "KV memory 64.0 KiB 1.0 MiB 16.0x less" in text


def test_answers_show_errors_and_cut_ends():
    run = EngineRun(
        (
            result((1,)),
            result((), error=ValueError("[no] room"), finish_reason="error"),
            result((1,), finish_reason="stop"),
        ),
        SimpleNamespace(),
        1.0,
        1,
    )
    text = printed(print_answers, ["a?", "b?", "c?"], run)
    assert text.splitlines() == [
        " 1. a?", "    some text …", " 2. b?", "    [no] room", " 3. c?", "    some text",
    ]  # fmt: skip
