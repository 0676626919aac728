"""Shows answers while they grow: a live table on a terminal, one line a finished answer elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from ..engine import Request

__all__ = ["Board", "LinesBoard", "LiveBoard", "board_for"]

# Drawing 16 rows takes about 5 ms; four times a second is smooth and costs the model nothing worth naming.
_SECONDS_BETWEEN_DRAWINGS = 0.25


class Board(Protocol):
    """Gets all requests after each step, and shows what changed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, requests: Sequence[Request]) -> None:
        """Shows the requests as they are now."""


def board_for(console: Console, questions: Sequence[str]) -> Board:
    """The live table where the console is a terminal, else lines."""
    return LiveBoard(console, questions) if console.is_terminal else LinesBoard(console, questions)


class LiveBoard:
    """A table of request, state, tokens and the end of the answer so far; gone when the block ends."""

    def __init__(self, console: Console, questions: Sequence[str]) -> None:
        self._questions = questions
        # No refresh thread: it would take turns with the kernels' threads on small machines.
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn_at = -1.0

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def update(self, requests: Sequence[Request]) -> None:
        """Draws the table, unless it was drawn a moment ago."""
        now = time.monotonic()
        if now - self._drawn_at >= _SECONDS_BETWEEN_DRAWINGS:
            self._live.update(self._table(requests), refresh=True)
            self._drawn_at = now

    def _table(self, requests: Sequence[Request]) -> Table:
        table = Table(box=None, expand=True, pad_edge=False, header_style="bold")
        table.add_column("#", justify="right", width=3)
        table.add_column("request", no_wrap=True, ratio=2)
        table.add_column("state", width=8)
        table.add_column("tokens", justify="right", width=6)
        table.add_column("answer", no_wrap=True, ratio=3)
        for number, (request, question) in enumerate(zip(requests, self._questions, strict=True), start=1):
            table.add_row(
                str(number), Text(question), request.status, str(len(request.token_ids)), _tail(request.text, 60)
            )
        return table


class LinesBoard:
    """One line when a request is answered; for pipes and files."""

    def __init__(self, console: Console, questions: Sequence[str]) -> None:
        self._console = console
        self._questions = questions
        self._shown: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, requests: Sequence[Request]) -> None:
        """Prints a line for each request that finished since the last call."""
        for number, request in enumerate(requests, start=1):
            if request.finished and number not in self._shown:
                self._shown.add(number)
                line = f"[{len(self._shown)}/{len(requests)}] request {number}: {len(request.token_ids)} tokens"
                self._console.print(line, markup=False, highlight=False)


def _tail(text: str, width: int) -> Text:
    line = " ".join(text.split())
    return Text(line if len(line) <= width else f"…{line[1 - width :]}")
