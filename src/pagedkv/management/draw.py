"""Pictures of who owns which page: the page map and the prefix cache's tree, as text or as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..shapes import check_choice, check_int
from .draw_snapshot import take_picture
from .draw_svg import svg_of
from .draw_text import Decode, text_of

if TYPE_CHECKING:
    from .hybrid_manager import HybridKVCacheManager
    from .manager import KVCacheManager
    from .sequence import Sequence

__all__ = ["draw"]

_MIN_WIDTH = {"text": 40, "svg": 400}
_DEFAULT_WIDTH = {"text": 80, "svg": 800}


def draw(
    manager: KVCacheManager | HybridKVCacheManager,
    *,
    form: str = "text",
    width: int | None = None,
    color: bool = False,
    tree: bool = True,
    decode: Decode | None = None,
    names: Mapping[Sequence, str] | None = None,
    max_rows: int = 40,
) -> str:
    """The state of `manager` now.

    form:     "text" for a terminal, or "svg", a document that stands alone.
    width:    characters (default 80, at least 40), or pixels of an SVG (default 800, at least 400).
    color:    of text: ANSI colours on top of the letters. An SVG has both always.
    tree:     the prefix cache too.
    decode:   turns a list of token ids into text; without it the tree shows ids. Called without the manager's lock.
    names:    what to call some sequences. "Q" or "Q and more" gives the letter of its pages too; the other sequences
              get the letters that are left, in the order of opening.
    max_rows: rows of the page map, and nodes of the tree. Where the pages need more rows, a cell is several pages; of
              the nodes the first are drawn, and the others counted.
    Cells:    `.` free; a letter, one sequence; `+` several; `=` in the prefix cache alone. A page that is pinned, which
              is in the prefix cache and locked there, is a capital letter, `#`, or `!` when no sequence names it.
    Cost:     a pass over the pages, the sequences and the nodes, under the manager's lock.
    Raises:   ValueError, TypeError for misuse.

    >>> manager = KVCacheManager(10, page_size=4)
    >>> seq = manager.open([1, 2, 3, 4, 5, 6])
    >>> _ = seq.append(6)
    >>> seq.commit([1, 2, 3, 4, 5, 6])
    >>> print(draw(manager, tree=False))
    10 pages of 4 tokens, 1 sequence
    <BLANKLINE>
    0 Aa........
    <BLANKLINE>
    . free 8   a owned 2   + shared 0   = cached 0   A # ! pinned 1
    <BLANKLINE>
    A 6 tokens, pages 0-1
    """
    if not hasattr(manager, "budget"):
        raise TypeError(f"manager must be a KVCacheManager, got {type(manager).__name__}.")
    check_choice("form", form, list(_MIN_WIDTH))
    width = _DEFAULT_WIDTH[form] if width is None else width
    check_int("width", width, minimum=_MIN_WIDTH[form])
    check_int("max_rows", max_rows, minimum=1)
    if decode is not None and not callable(decode):
        raise TypeError(f"decode must be a function of a list of ids, got {type(decode).__name__}.")
    if names is not None and not isinstance(names, Mapping):
        raise TypeError(f"names must map sequences to text, got {type(names).__name__}.")
    picture = take_picture(manager, names=names, max_rows=max_rows)
    if form == "svg":
        return svg_of(picture, width=width, tree=tree, decode=decode, max_rows=max_rows)
    return text_of(picture, width=width, color=color, tree=tree, decode=decode, max_rows=max_rows)
