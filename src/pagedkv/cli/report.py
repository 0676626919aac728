"""What the demo prints at its end; every figure was measured in the run that it closes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .baseline import BaselineRun
from .measure import EngineRun
from .units import format_bytes

__all__ = ["count_equal_answers", "print_answers", "print_comparison", "print_engine_report"]


def print_answers(console: Console, questions: Sequence[str], run: EngineRun) -> None:
    """Every question with its answer, or the error it ended in."""
    for number, (question, result) in enumerate(zip(questions, run.results, strict=True), start=1):
        console.print(Text(f"{number:>2}. {question}", style="bold"))
        if result.error is not None:
            console.print(Text(f"    {result.error}", style="red"))
        else:
            more = " …" if result.finish_reason == "length" else ""
            console.print(Text(f"    {' '.join(result.text.split())}{more}"))


def print_engine_report(console: Console, run: EngineRun) -> None:
    """Speed, sharing, pages and memory of the paged run."""
    stats = run.stats
    first_tokens = [result.timings.first_token_s for result in run.results if result.error is None]
    table = _two_columns("over the paged cache")
    table.add_row("requests", f"{stats.num_finished} in {run.total_s:.1f} s, {stats.num_steps} steps")
    table.add_row("prefill", f"{stats.num_prefill_tokens:,} tokens in {stats.prefill_s:.2f} s")
    table.add_row("", f"{stats.prefill_tokens_per_s:,.0f} computed tokens/s")
    table.add_row("decode", f"{stats.num_decode_tokens:,} tokens in {stats.decode_s:.2f} s")
    table.add_row("", f"{stats.decode_tokens_per_s:,.1f} tokens/s")
    if first_tokens:
        table.add_row("first token after", f"{statistics.median(first_tokens):.2f} s (median)")
    table.add_row("prefix hit rate", f"{stats.hit_rate:.1%}")
    table.add_row("tokens not recomputed", f"{stats.num_cached_tokens:,} of {stats.num_prompt_tokens:,}")
    table.add_row("preemptions", f"{stats.num_preemptions}")
    table.add_row(
        f"pages of {stats.page_size} tokens",
        f"{stats.peak_pages_used} used at the peak, {stats.peak_pages_shared} of them shared",
    )
    table.add_row("pages now", f"{stats.num_pages_cached} cached, {stats.num_pages_free} free of {stats.num_pages}")
    table.add_row("KV memory at the peak", format_bytes(run.peak_bytes))
    contiguous = format_bytes(run.contiguous_bytes)
    ratio = f" ({run.contiguous_bytes / run.peak_bytes:.1f}x)" if run.peak_bytes else ""
    table.add_row(f"{len(run.results)} contiguous caches", f"{contiguous}{ratio}")
    console.print(table)


def print_comparison(console: Console, run: EngineRun, baseline: BaselineRun) -> None:
    """The same requests beside `model.generate`, and how many answers are equal."""
    stats = run.stats
    table = Table(title="beside model.generate", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for header in ("", "pagedkv", "generate", "ratio"):
        table.add_column(header, justify="right" if header else "left")
    ours_s, theirs_s = stats.prefill_s, baseline.prefill_s
    table.add_row("prefill, s", f"{ours_s:.2f}", f"{theirs_s:.2f}", _ratio(theirs_s, ours_s, "less"))
    ours_per_s, theirs_per_s = stats.decode_tokens_per_s, baseline.decode_tokens_per_s
    table.add_row("decode, tokens/s", f"{ours_per_s:.1f}", f"{theirs_per_s:.1f}", _ratio(ours_per_s, theirs_per_s, ""))
    total_s = baseline.prefill_s + baseline.decode_s
    table.add_row("all, s", f"{run.total_s:.1f}", f"{total_s:.1f}", _ratio(total_s, run.total_s, "less"))
    ours_bytes, theirs_bytes = run.peak_bytes, baseline.cache_bytes
    memory = _ratio(theirs_bytes, ours_bytes, "less")
    table.add_row("KV memory", format_bytes(ours_bytes), format_bytes(theirs_bytes), memory)
    console.print(table)
    console.print(Text(_equality(run, baseline)))


def count_equal_answers(run: EngineRun, baseline: BaselineRun) -> int:
    """How many requests got the same token ids from both."""
    return sum(result.token_ids == answer for result, answer in zip(run.results, baseline.answers, strict=True))


def _equality(run: EngineRun, baseline: BaselineRun) -> str:
    num_equal = count_equal_answers(run, baseline)
    text = (
        f"equal answers: {num_equal} of {len(run.results)}, token for token. generate ran one left-padded batch with "
        "its default cache; its prefill ends when the first logits of the batch arrive."
    )
    if num_equal == len(run.results):
        return text
    for number, (result, answer) in enumerate(zip(run.results, baseline.answers, strict=True), start=1):
        if result.token_ids != answer:
            text += f"\n    request {number} differs from token {_first_difference(result.token_ids, answer) + 1} on"
    reason = "A padded batch rounds differently, and so do pages of another dtype than the model's"
    return f"{text}\n    {reason}; where two tokens are nearly equally likely, that decides."


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = zip(ours, theirs, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def _two_columns(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def _ratio(larger: float, smaller: float, word: str) -> str:
    return f"{larger / smaller:.1f}x {word}".rstrip() if smaller else ""
