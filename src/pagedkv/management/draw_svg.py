"""A manager's state as one SVG document: no script, no style sheet, no font or image from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from .allocator import PageArray
from .draw_snapshot import CellMap, PageKind, Picture, SequenceRow, TreeRow, group_pages
from .draw_text import (
    Decode,
    abbreviate_tokens,
    cell_symbols,
    clip,
    describe_sequence,
    legend_items,
    page_ranges,
)

__all__ = ["svg_of"]

# Colours that the colour-blind tell apart; every cell that is large enough has its symbol as well.
_COLORS = ("#E69F00", "#56B4E9", "#2BB38A", "#F0E442", "#6FA0D8", "#E8793A", "#CC79A7", "#A6CE6B")
_FILL_OF = {
    PageKind.FREE: "#F2F2F2",
    PageKind.CACHED: "#9A9A9A",
    PageKind.CACHED_PINNED: "#9A9A9A",
    PageKind.RESERVED: "#FFFFFF",
}
_PINNED = (PageKind.OWNED_PINNED, PageKind.SHARED_PINNED, PageKind.CACHED_PINNED)
_SHARED = (PageKind.SHARED, PageKind.SHARED_PINNED)

_MARGIN = 16
_LINE = 20
_CHAR = 7.3  # an upper bound of the width of a monospaced character of 12 pixels
_CELL_SIZES = (28, 24, 20, 16, 12, 10)
_MIN_LETTER_CELL = 16
_MAX_CELLS = 2048
_MAX_SEQUENCES = 26
_MAX_DEPTH = 12
_INDENT = 18
_STRIP_PAGES = 8
_STRIP_CELL = 10


class _Sheet:
    """Elements one below the other; `y` is the top of what comes next."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.y = _MARGIN
        self.elements: list[str] = []

    def text(self, x: float, y: float, words: str, **attributes: str) -> None:
        """Text whose base line is at y, escaped."""
        more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.elements.append(f'<text x="{x:g}" y="{y:g}"{more}>{escape(words)}</text>')

    def rect(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "") -> None:
        """A rectangle."""
        edge = f' stroke="{stroke}"' if stroke else ""
        self.elements.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{edge}/>')

    def line(self, words: str, x: float = _MARGIN, **attributes: str) -> None:
        """A line of text of its own."""
        self.text(x, self.y + 14, clip(words, int((self.width - x - _MARGIN) / _CHAR)), **attributes)
        self.y += _LINE

    def document(self) -> str:
        """The finished SVG."""
        height = self.y + _MARGIN
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{height}" '
                f'viewBox="0 0 {self.width} {height}" font-family="monospace" font-size="12" fill="#222">',
                f'<rect width="{self.width}" height="{height}" fill="#FFFFFF"/>',
                *self.elements,
                "</svg>\n",
            ]
        )


def svg_of(picture: Picture, *, width: int, tree: bool, decode: Decode | None, max_rows: int) -> str:
    """The whole picture: totals, map, legend, sequences and tree."""
    sheet, stats = _Sheet(width), picture.stats
    sheet.line(
        f"{stats.num_pages:,} pages of {stats.page_size:,} tokens, sequences: {stats.num_sequences:,}",
        font_weight="bold",
    )
    _add_map(sheet, picture, max_rows)
    _add_legend(sheet, picture)
    _add_sequences(sheet, picture)
    if tree:
        _add_tree(sheet, picture, decode)
    return sheet.document()


def _add_map(sheet: _Sheet, picture: Picture, max_rows: int) -> None:
    """Cells as large as the rows allow; the number of its first page before each row."""
    num_pages = picture.kinds.shape[0]
    left = _MARGIN + len(f"{num_pages - 1}") * _CHAR + 6
    columns_of = {side: max(1, int((sheet.width - left - _MARGIN) // side)) for side in _CELL_SIZES}
    fits = (side for side in _CELL_SIZES if num_pages <= min(_MAX_CELLS, columns_of[side] * max_rows))
    side = next(fits, _CELL_SIZES[-1])
    columns = columns_of[side] // 10 * 10 or columns_of[side]
    cells = group_pages(picture, min(_MAX_CELLS, columns * max_rows))
    if cells.pages_per_cell > 1:
        sheet.line(f"a cell is {cells.pages_per_cell:,} pages and shows what most of them are")
    symbols = cell_symbols(picture, cells)
    fills_of = _fills(picture, cells)
    for number, symbol in enumerate(symbols):
        row, column = divmod(number, columns)
        x, y = left + column * side, sheet.y + row * side
        if column == 0:
            first = str(number * cells.pages_per_cell)
            sheet.text(left - 6, y + side / 2 + 4, first, text_anchor="end", fill="#777")
        _add_cell(sheet, x, y, side - 2, fills_of(number), PageKind(int(cells.kinds[number])), symbol)
    sheet.y += -(-len(symbols) // columns) * side + 8


def _fills(picture: Picture, cells: CellMap) -> Callable[[int], list[str]]:
    """The colours of a cell by its number: of a page that is shared, those of the sequences that share it."""

    def fills(number: int) -> list[str]:
        kind = PageKind(int(cells.kinds[number]))
        if kind in _FILL_OF:
            return [_FILL_OF[kind]]
        if kind in _SHARED and cells.pages_per_cell == 1:
            return [_color(picture.sequences[row]) for row in picture.sharers[:, number].tolist() if row >= 0]
        return [_color(picture.sequences[int(cells.owners[number])])]

    return fills


def _add_cell(sheet: _Sheet, x: float, y: float, side: int, fills: list[str], kind: PageKind, symbol: str) -> None:
    """A square of stripes; a pinned page has a frame."""
    stripe = side / len(fills)
    for number, fill in enumerate(fills):
        sheet.rect(x + number * stripe, y, stripe, side, fill)
    if kind in _PINNED:
        sheet.rect(x + 0.5, y + 0.5, side - 1, side - 1, "none", "#222")
    if side + 2 >= _MIN_LETTER_CELL and kind != PageKind.FREE:
        sheet.text(x + side / 2, y + side / 2 + 4, symbol, text_anchor="middle")


def _add_legend(sheet: _Sheet, picture: Picture) -> None:
    x = float(_MARGIN)
    for item in legend_items(picture):
        item_width = (len(item) + 3) * _CHAR
        if x > _MARGIN and x + item_width > sheet.width - _MARGIN:
            x, sheet.y = float(_MARGIN), sheet.y + _LINE
        sheet.text(x, sheet.y + 14, item)
        x += item_width
    sheet.y += _LINE
    sheet.line("A shared page has the colours of its sequences, a pinned one a frame.", fill="#777")
    sheet.y += 8


def _add_sequences(sheet: _Sheet, picture: Picture) -> None:
    for row in picture.sequences[:_MAX_SEQUENCES]:
        sheet.rect(_MARGIN, sheet.y + 3, 14, 14, _color(row))
        sheet.text(_MARGIN + 7, sheet.y + 14, row.letter, text_anchor="middle")
        sheet.line(describe_sequence(row), x=_MARGIN + 22)
    num_more = len(picture.sequences) - _MAX_SEQUENCES
    if num_more > 0:
        sheet.line(f"and {num_more:,} more sequences; letters repeat")
    sheet.y += 8


def _add_tree(sheet: _Sheet, picture: Picture, decode: Decode | None) -> None:
    if picture.tree is None:
        sheet.line("no prefix cache", font_weight="bold")
        return
    stats = picture.stats
    sheet.line(
        f"prefix cache: pages {stats.published:,}, nodes {picture.num_nodes:,}, evictable pages {stats.evictable:,}; "
        "age 0 was used last",
        font_weight="bold",
    )
    # Of each row, where the lines to the nodes below it begin.
    anchors: list[tuple[float, float]] = []
    for row in picture.tree:
        x = _MARGIN + min(row.depth, _MAX_DEPTH) * _INDENT
        middle = sheet.y + _LINE / 2
        if row.namespace is not None:
            sheet.line(f"namespace {row.namespace}")
        else:
            _add_branch(sheet, anchors[row.parent], x, middle)
            _add_node(sheet, picture, row, x, decode)
        anchors.append((x + 6, middle + 6))
    num_more = picture.num_nodes - sum(row.namespace is None for row in picture.tree)
    if num_more:
        sheet.line(f"and {num_more:,} more nodes")


def _add_branch(sheet: _Sheet, start: tuple[float, float], x: float, middle: float) -> None:
    from_x = min(start[0], x - 2)
    sheet.elements.append(
        f'<path d="M{from_x:g} {start[1]:g}V{middle:g}H{x:g}" fill="none" stroke="#999" stroke-width="1"/>'
    )


def _add_node(sheet: _Sheet, picture: Picture, row: TreeRow, x: float, decode: Decode | None) -> None:
    """A strip of the node's first pages in the colours of the map, then its pages, tokens, locks and age in words."""
    shown = row.pages[:_STRIP_PAGES]
    _add_strip(sheet, picture, shown, x, sheet.y + (_LINE - _STRIP_CELL) / 2)
    left = x + shown.shape[0] * _STRIP_CELL + 6
    room = int((sheet.width - left - _MARGIN) / _CHAR)
    start = f"{clip(page_ranges(row.pages), max(8, room // 4))}: "
    end = f"  {'' if not row.locks else f'locks {row.locks}, '}age {row.age}"
    tokens = abbreviate_tokens(row, max(8, room - len(start) - len(end)), decode)
    sheet.line(start + tokens + end, x=left)


def _add_strip(sheet: _Sheet, picture: Picture, pages: PageArray, x: float, y: float) -> None:
    for number, page in enumerate(pages.tolist()):
        owner = int(picture.sharers[0, page])
        fill = _FILL_OF[PageKind.CACHED] if owner < 0 else _color(picture.sequences[owner])
        sheet.rect(x + number * _STRIP_CELL, y, _STRIP_CELL - 1, _STRIP_CELL - 1, fill)


def _color(row: SequenceRow) -> str:
    return _COLORS[(ord(row.letter) - ord("A")) % len(_COLORS)]
