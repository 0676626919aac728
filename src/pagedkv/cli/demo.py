"""`pagedkv demo`: chat requests on a real model over one paged pool, what they cost, and the same by model.generate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.text import Text

from ..engine import Engine
from ..integrations.transformers.checkpoint import load_causal_lm
from ..shapes import dtype_name
from .baseline import run_generate
from .measure import run_engine
from .progress import board_for
from .quiet import quiet_transformers
from .report import print_answers, print_comparison, print_engine_report
from .workload import demo_requests

__all__ = ["DemoOptions", "run_demo"]


@dataclass(frozen=True)
class DemoOptions:
    """What the command's options say; None leaves the choice to the engine."""

    model: str | None = None
    num_requests: int = 16
    max_new_tokens: int = 64
    page_size: int = 16
    num_pages: int | None = None
    kv_dtype: torch.dtype | None = None
    backend: str = "auto"
    compares: bool = True


def run_demo(options: DemoOptions, console: Console) -> int:
    """Runs the demo on a console; returns how many requests ended in an error."""
    with quiet_transformers():
        with _waiting(console, "looking for the model") as tell:
            loaded = load_causal_lm(options.model, on_progress=tell)
        requests = demo_requests(loaded.tokenizer, options.num_requests)
        prompts = [request.prompt_ids for request in requests]
        questions = [request.question for request in requests]
        lengths = sorted(map(len, prompts))
        with Engine(
            loaded.model,
            loaded.tokenizer,
            num_pages=options.num_pages,
            page_size=options.page_size,
            kv_dtype=options.kv_dtype,
            max_num_seqs=options.num_requests,
            backend=options.backend,
        ) as engine:
            _print_line(
                console,
                f"{loaded.name}: {len(requests)} chat requests of {lengths[0]} to {lengths[-1]} tokens, "
                f"the first {_num_shared(prompts)} the same; pool of {engine.pool.num_pages} pages "
                f"of {options.page_size} tokens, {dtype_name(engine.pool.spec.dtype)}; "
                f"{torch.get_num_threads()} threads",
            )
            _warm_up(loaded.model)
            with board_for(console, questions) as board:
                run = run_engine(engine, prompts, options.max_new_tokens, on_step=board.update)
        print_answers(console, questions, run)
        console.print()
        print_engine_report(console, run)
        if options.compares:
            console.print()
            with _waiting(console, "running the same requests through model.generate"):
                baseline = run_generate(loaded.model, prompts, options.max_new_tokens)
            print_comparison(console, run, baseline)
    return sum(result.error is not None for result in run.results)


@contextlib.contextmanager
def _waiting(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Says what is being waited for: a spinner on a terminal, a line each elsewhere."""
    if console.is_terminal:
        with console.status(text) as status:
            yield status.update
    else:
        _print_line(console, text)
        yield lambda text: _print_line(console, text)


def _warm_up(model: torch.nn.Module) -> None:
    """One forward of one token: brings the weights from the mapped file into memory, before anything is measured."""
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)


def _num_shared(prompts: list[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with."""
    num_shared = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        num_shared += 1
    return num_shared


def _print_line(console: Console, text: str) -> None:
    console.print(Text(text))
