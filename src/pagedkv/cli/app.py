"""The typer application. Commands import what runs a model only when they run, so that --help and size stay quick."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import PagedKVError
from .info import describe_installation
from .options import KVDtype
from .size import Spec, describe_size, spec_of_config, spec_of_geometry
from .units import parse_bytes

__all__ = ["app"]

app = typer.Typer(
    name="pagedkv",
    help="The paged KV cache of LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Directory, .gguf file or Hugging Face id. Default: SmolLM2-135M-Instruct."),
]
PageSize = Annotated[int, typer.Option("--page-size", min=1, help="Tokens of one page.")]

# What a command can meet without being wrong itself; everything else is a defect and keeps its traceback.
_EXPECTED_ERRORS = (PagedKVError, ValueError, OSError, ImportError, MemoryError)


@app.command()
def demo(
    model: Model = None,
    compare: Annotated[bool, typer.Option(help="Run the same through model.generate as well.")] = True,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="Chat requests to answer.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    page_size: PageSize = 16,
    num_pages: Annotated[int | None, typer.Option(min=1, help="Pages of the pool. Default: by memory.")] = None,
    kv_dtype: Annotated[KVDtype, typer.Option(help="Dtype of keys and values.")] = KVDtype.AUTO,
    backend: Annotated[str, typer.Option(help="Back end of the kernels.")] = "auto",
) -> None:
    """Answer chat requests that share a long system prompt, and print what that cost."""
    with _readable_errors():
        from .demo import DemoOptions, run_demo

        options = DemoOptions(
            model, requests, max_new_tokens, page_size, num_pages, kv_dtype.torch_dtype, backend, compare
        )
        num_failed = run_demo(options, Console())
    if num_failed:
        _fail(f"{num_failed} of {requests} requests ended in an error.")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="System message before the question.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample within this probability; 1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeat a sampled answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    page_size: PageSize = 16,
) -> None:
    """Answer one prompt and stream the answer to standard output."""
    with _readable_errors():
        from ..engine import SamplingParams
        from .generate import stream_answer

        params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed, tuple(stop or ()))
        question = sys.stdin.read() if prompt == "-" else prompt
        with Console(stderr=True).status("loading") as status:

            def write(text: str) -> None:
                status.stop()
                typer.echo(text, nl=False)
                sys.stdout.flush()

            stream_answer(
                question,
                params,
                write,
                model=model,
                system=system,
                is_raw=raw,
                page_size=page_size,
                on_progress=status.update,
            )
        typer.echo()


@app.command()
def size(
    model: Model = None,
    layers: Annotated[int | None, typer.Option(min=1, max=100_000, help="Layers, if there is no --model.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="KV heads of a layer.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Dimension of a head.")] = None,
    dtype: Annotated[KVDtype, typer.Option(help="auto: the model's, float16 without one.")] = KVDtype.AUTO,
    page_size: Annotated[int | None, typer.Option(min=1, help="Tokens of a page. Default: 16, 64 for MLA.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks; figures are of one.")] = 1,
    memory: Annotated[str | None, typer.Option(help="What fits into this much, such as 8GiB.")] = None,
    tokens: Annotated[int | None, typer.Option(min=0, help="What this many tokens take.")] = None,
) -> None:
    """Print bytes of a token and a page, and what fits into memory."""
    with _readable_errors():
        memory_bytes = None if memory is None else parse_bytes(memory)
        if model is None:
            spec: Spec = spec_of_geometry(
                layers, kv_heads, head_dim, dtype=dtype.torch_dtype, page_size=page_size, tp_size=tp
            )
        elif layers is not None or kv_heads is not None or head_dim is not None:
            raise ValueError("geometry must be --model or --layers, --kv-heads and --head-dim, got both.")
        else:
            from .model_config import load_config

            spec = spec_of_config(load_config(model), dtype=dtype.torch_dtype, page_size=page_size, tp_size=tp)
        _print_rows(describe_size(spec, tp_size=tp, memory_bytes=memory_bytes, num_tokens=tokens))


@app.command("inspect")
def inspect_pages(
    trace: Annotated[
        str | None, typer.Argument(help="JSON lines of calls; - reads standard input. Default: the ten-page story.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the last state to this file instead.")] = None,
    until: Annotated[int | None, typer.Option(min=0, help="Stop after this many steps.")] = None,
    last: Annotated[bool, typer.Option("--last", help="Print the last state only.")] = False,
    tree: Annotated[bool, typer.Option(help="Show the prefix cache's tree too.")] = True,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the map, and nodes of the tree.")] = 40,
    width: Annotated[int | None, typer.Option(min=40, help="Characters a line. Default: the terminal's.")] = None,
    color: Annotated[bool | None, typer.Option(help="Colours. Default: on a terminal, without NO_COLOR.")] = None,
) -> None:
    """Replay a trace and draw who owns which page: free, owned, shared, cached, pinned."""
    with _readable_errors():
        from .inspect import InspectOptions, read_trace, show_trace, write_picture

        is_terminal = sys.stdout.isatty()
        if color is None:
            color = is_terminal and not os.environ.get("NO_COLOR")
        columns = shutil.get_terminal_size().columns if is_terminal else 80
        options = InspectOptions(width or max(40, columns), rows, color, tree, until, last)
        steps = read_trace(trace)
        if svg is not None:
            typer.echo(write_picture(steps, options, svg))
            return
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        show_trace(
            steps,
            options,
            # A terminal that has no box-drawing characters shows question marks for them.
            lambda text: typer.echo(text.encode(encoding, "replace").decode(encoding), color=options.color),
        )


@app.command()
def info() -> None:
    """Print version, CPU, instruction set, and which back ends run here and why others do not."""
    with _readable_errors():
        _print_rows(describe_installation())


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Ends the command with one line on standard error; PAGEDKV_TRACEBACK=1 shows where an error came from."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\npagedkv: interrupted.", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise  # the reader left, as `head` does: typer ends the program without a word
    except _EXPECTED_ERRORS as error:
        if os.environ.get("PAGEDKV_TRACEBACK") == "1":
            raise
        _fail(_one_line(error))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return f"{text}. Run: pip install 'pagedkv[transformers]'"
    return text


def _fail(message: str) -> None:
    typer.echo(f"pagedkv: {message}", err=True)
    raise typer.Exit(1)


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
