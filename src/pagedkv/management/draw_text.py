"""A manager's state as text for a terminal: letters and symbols first, colours on top of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from textwrap import wrap
from typing import Any

import numpy as np
import numpy.typing as npt

from .draw_snapshot import CellMap, PageKind, Picture, SequenceRow, TreeRow, group_pages

__all__ = [
    "SYMBOL_OF",
    "Decode",
    "abbreviate_tokens",
    "cell_symbols",
    "clip",
    "counts_line",
    "describe_sequence",
    "legend_items",
    "map_lines",
    "page_ranges",
    "sequence_lines",
    "text_of",
    "tree_lines",
    "visible",
]

Decode = Callable[[list[int]], str]

# OWNED and OWNED_PINNED are the letter of their sequence, in lower and in upper case.
SYMBOL_OF = {
    PageKind.FREE: ".",
    PageKind.SHARED: "+",
    PageKind.SHARED_PINNED: "#",
    PageKind.CACHED: "=",
    PageKind.CACHED_PINNED: "!",
    PageKind.RESERVED: "?",
}

# Backgrounds of the 256-colour terminal near eight colours that the colour-blind tell apart; the text on them is black.
_BACKGROUNDS = (214, 117, 36, 227, 75, 208, 175, 150)
_STYLE_OF = {
    PageKind.FREE: "2",
    PageKind.SHARED: "7",
    PageKind.SHARED_PINNED: "1;7",
    PageKind.CACHED: "97;48;5;240",
    PageKind.CACHED_PINNED: "1;97;48;5;240",
    PageKind.RESERVED: "31",
}

_MAX_CELLS_A_ROW = 100
_GROUP = 10
_MAX_SEQUENCES = 26
_MAX_RUNS = 60


def text_of(picture: Picture, *, width: int, color: bool, tree: bool, decode: Decode | None, max_rows: int) -> str:
    """The whole picture: totals, map, legend, sequences and tree."""
    stats = picture.stats
    pages, sequences = _plural(stats.num_pages, "page"), _plural(stats.num_sequences, "sequence")
    sections = [
        wrap(f"{pages} of {_plural(stats.page_size, 'token')}, {sequences}", width),
        map_lines(picture, width=width, color=color, max_rows=max_rows),
        _wrapped(legend_items(picture), width),
        sequence_lines(picture, width=width, color=color),
    ]
    if tree:
        sections.append(tree_lines(picture, width=width, decode=decode))
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def map_lines(picture: Picture, *, width: int, color: bool, max_rows: int) -> list[str]:
    """The page map, rows of cells behind the number of their first page; more than fit get several pages a cell."""
    num_pages = picture.kinds.shape[0]
    label = len(str(num_pages - 1))
    groups = max(1, (width - label - 1) // (_GROUP + 1))
    per_row = min(_MAX_CELLS_A_ROW, groups * _GROUP)
    cells = group_pages(picture, per_row * max_rows)
    symbols = cell_symbols(picture, cells)
    styles = _cell_styles(picture, cells) if color else None
    lines = []
    if cells.pages_per_cell > 1:
        lines.extend(wrap(f"a cell is {cells.pages_per_cell:,} pages and shows what most of them are", width))
    for start in range(0, len(symbols), per_row):
        stop = min(start + per_row, len(symbols))
        row = " ".join(
            _span(symbols[at : min(at + _GROUP, stop)], styles and styles[at : min(at + _GROUP, stop)])
            for at in range(start, stop, _GROUP)
        )
        lines.append(f"{start * cells.pages_per_cell:>{label}} {row}")
    return lines


def cell_symbols(picture: Picture, cells: CellMap) -> str:
    """One character a cell: what says it without colour."""
    letters = [row.letter for row in picture.sequences]
    symbols = []
    for kind, owner in zip(cells.kinds.tolist(), cells.owners.tolist(), strict=True):
        if kind == PageKind.OWNED:
            symbols.append(letters[owner].lower())
        elif kind == PageKind.OWNED_PINNED:
            symbols.append(letters[owner])
        else:
            symbols.append(SYMBOL_OF[PageKind(kind)])
    return "".join(symbols)


def legend_items(picture: Picture) -> list[str]:
    """Symbol, name and number of pages; `shared` are some of the owned, `pinned` some of all that are not free."""
    counts = picture.counts
    items = [
        f". free {counts['free']:,}",
        f"a owned {counts['owned']:,}",
        f"+ shared {counts['shared']:,}",
        f"= cached {counts['cached']:,}",
        f"A # ! pinned {counts['pinned']:,}",
    ]
    return [*items, f"? reserved {counts['reserved']:,}"] if counts["reserved"] else items


def counts_line(picture: Picture) -> str:
    """The legend's numbers in a sentence."""
    counts = picture.counts
    return (
        f"{counts['free']:,} free, {counts['owned']:,} owned ({counts['shared']:,} shared), "
        f"{counts['cached']:,} cached, {counts['pinned']:,} pinned"
    )


def sequence_lines(picture: Picture, *, width: int, color: bool) -> list[str]:
    """A line a sequence, behind its letter."""
    lines = []
    for row in picture.sequences[:_MAX_SEQUENCES]:
        letter = _span(row.letter, [_letter_style(row.letter)] if color else None)
        lines.append(f"{letter} {clip(describe_sequence(row), width - 2)}")
    num_more = len(picture.sequences) - len(lines)
    if num_more:
        lines.append(f"and {_plural(num_more, 'more sequence')}; letters repeat")
    return lines


def describe_sequence(row: SequenceRow) -> str:
    """Its name, tokens and pages, in order of position."""
    name = f"{visible(row.name)}: " if row.name else ""
    pages = f"page{'' if row.pages.size == 1 else 's'} {page_ranges(row.pages)}" if row.pages.size else "no pages"
    return f"{name}{_plural(row.num_tokens, 'token')}, {pages}"


def tree_lines(picture: Picture, *, width: int, decode: Decode | None) -> list[str]:
    """The prefix cache: a line a node with its pages, tokens, locks and age; `↳` continues the only branch."""
    if picture.tree is None:
        return ["no prefix cache"]
    num_held = picture.stats.published
    pages, nodes = _plural(num_held, "page"), _plural(picture.num_nodes, "node")
    lines = wrap(f"prefix cache: {pages} in {nodes}, {picture.stats.evictable:,} evictable; age 0 was used last", width)
    below: list[str] = []
    for row in picture.tree:
        if row.namespace is not None:
            below.append("")
            lines.append(clip(f"namespace {row.namespace}", width))
            continue
        above = below[row.parent]
        branch = "↳ " if row.is_only else "└─ " if row.is_last else "├─ "
        below.append(above if row.is_only else above + ("   " if row.is_last else "│  "))
        lines.append(_tree_line(row, _clip_left(above + branch, width // 3), width, decode))
    num_more = picture.num_nodes - sum(row.namespace is None for row in picture.tree)
    if num_more:
        lines.append(f"and {_plural(num_more, 'more node')}")
    return lines


def _tree_line(row: TreeRow, prefix: str, width: int, decode: Decode | None) -> str:
    locks = f"{_plural(row.locks, 'lock')}, " if row.locks else ""
    end = f"  {locks}age {row.age}"
    start = f"{prefix}{clip(page_ranges(row.pages), max(8, width // 5))}: "
    room = max(8, width - len(start) - len(end))
    return clip(start + abbreviate_tokens(row, room, decode) + end, width)


def abbreviate_tokens(row: TreeRow, room: int, decode: Decode | None) -> str:
    """The tokens of a node in at most `room` characters: first ids, last id and their number, or decoded text."""
    if decode is not None:
        text = visible(str(decode(row.head)))
        return clip(f'"{text}"' if row.num_tokens == len(row.head) else f'"{text}…', room)
    ids = row.head + row.tail
    if row.num_tokens == len(ids) and len(whole := " ".join(map(str, ids))) <= room:
        return whole
    end = f" … {ids[-1]} ({row.num_tokens:,} tokens)"
    shown = ""
    for token in row.head[:-1]:
        if len(shown) + len(str(token)) + 1 + len(end) > room:
            break
        shown += f" {token}" if shown else str(token)
    return clip(shown + end if shown else f"({row.num_tokens:,} tokens)", room)


def page_ranges(pages: npt.NDArray[np.integer[Any]]) -> str:
    """Page ids in their order, runs as first-last.

    >>> page_ranges(np.array([4, 5, 6, 1, 9], np.int32))
    '4-6, 1, 9'
    """
    bounds = np.flatnonzero(np.diff(pages, prepend=-9, append=-9) != 1)
    starts, stops = bounds[:-1], bounds[1:]
    # No line has room for more runs than these.
    shown = [
        str(pages[start]) if stop - start == 1 else f"{pages[start]}-{pages[stop - 1]}"
        for start, stop in zip(starts[:_MAX_RUNS], stops[:_MAX_RUNS], strict=True)
    ]
    return ", ".join(shown if starts.shape[0] <= _MAX_RUNS else [*shown, "…"])


def visible(text: str) -> str:
    """`text` in one line: what is not printable is escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def clip(text: str, width: int) -> str:
    """`text`, or as much of it as fits with a … at the end."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _clip_left(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _wrapped(items: Iterable[str], width: int) -> list[str]:
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 3 + len(item) <= width:
            lines[-1] += f"   {item}"
        else:
            lines.append(item)
    return lines


def _cell_styles(picture: Picture, cells: CellMap) -> list[str]:
    letters = [_letter_style(row.letter) for row in picture.sequences]
    styles = []
    for kind, owner in zip(cells.kinds.tolist(), cells.owners.tolist(), strict=True):
        if kind in (PageKind.OWNED, PageKind.OWNED_PINNED):
            styles.append(letters[owner] if kind == PageKind.OWNED else f"1;{letters[owner]}")
        else:
            styles.append(_STYLE_OF[PageKind(kind)])
    return styles


def _letter_style(letter: str) -> str:
    return f"30;48;5;{_BACKGROUNDS[(ord(letter) - ord('A')) % len(_BACKGROUNDS)]}"


def _span(symbols: str, styles: list[str] | None) -> str:
    """`symbols` with one escape a run of equal styles."""
    if styles is None:
        return symbols
    parts, start = [], 0
    for stop in range(1, len(symbols) + 1):
        if stop == len(symbols) or styles[stop] != styles[start]:
            parts.append(f"\x1b[{styles[start]}m{symbols[start:stop]}\x1b[0m")
            start = stop
    return "".join(parts)
