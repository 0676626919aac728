"""`pagedkv inspect`: replays a trace and shows who owns which page after each of its steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..management.draw import draw
from ..management.draw_snapshot import take_picture
from ..management.draw_text import counts_line, map_lines
from .inspect_trace import Replay, Step, parse_trace

__all__ = ["InspectOptions", "read_trace", "show_trace", "write_picture"]

_STORY = "inspect_story.jsonl"


@dataclass(frozen=True)
class InspectOptions:
    """What to show, and how large; `until` is the number of the last step that is done, None for all."""

    width: int = 80
    max_rows: int = 40
    color: bool = False
    tree: bool = True
    until: int | None = None
    only_last: bool = False


def read_trace(path: str | None) -> list[Step]:
    """The steps of the file at `path`, of standard input for "-", of the ten-page story for None.

    Raises: ValueError for a file that cannot be read or is no trace.
    """
    if path is None:
        return parse_trace("the story", (resources.files(__package__) / _STORY).read_text("utf-8").splitlines())
    if path == "-":
        return parse_trace("standard input", sys.stdin)
    try:
        with open(path, encoding="utf-8") as lines:
            return parse_trace(path, lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"trace must be UTF-8 text, got {path!r} (byte {error.start} is not).") from error
    except OSError as error:
        raise ValueError(f"trace must be a file that can be read, got {path!r} ({error.strerror}).") from error


def show_trace(steps: list[Step], options: InspectOptions, write: Callable[[str], None]) -> None:
    """Writes the map and its counts after each step, and the whole picture at the end."""
    replay = Replay(steps[0])
    if not options.only_last and steps[0].note:
        write(steps[0].note)
    for number, step in enumerate(_chosen(steps, options), start=1):
        said = replay.run(step)
        if options.only_last:
            continue
        if step.note:
            write(f"\n{step.note}")
        picture = take_picture(replay.manager, names=replay.names, max_rows=1)
        lines = map_lines(picture, width=options.width, color=options.color, max_rows=options.max_rows)
        write("\n".join([f"{number:>3}  {said}", *(f"     {line}" for line in [*lines, counts_line(picture)])]))
    if not options.only_last:
        write("\nAt the end\n")
    write(_drawn(replay, options, "text", options.width))


def write_picture(steps: list[Step], options: InspectOptions, path: Path) -> str:
    """Does the steps, writes an SVG of what they leave to `path`, and says so."""
    replay = Replay(steps[0])
    chosen = _chosen(steps, options)
    for step in chosen:
        replay.run(step)
    try:
        path.write_text(_drawn(replay, options, "svg", None), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"svg must be a path that can be written, got '{path}' ({error.strerror}).") from error
    return f"{path}: {replay.manager.num_pages:,} pages after {len(chosen)} steps"


def _drawn(replay: Replay, options: InspectOptions, form: str, width: int | None) -> str:
    return draw(
        replay.manager,
        form=form,
        width=width,
        color=options.color,
        tree=options.tree,
        names=replay.names,
        max_rows=options.max_rows,
    )


def _chosen(steps: list[Step], options: InspectOptions) -> list[Step]:
    return steps[1:] if options.until is None else steps[1 : options.until + 1]
