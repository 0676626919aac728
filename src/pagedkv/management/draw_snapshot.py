"""What a picture shows, copied from a manager at one moment: each page, who names it, and the prefix cache's tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .allocator import PageArray
from .stats import ManagerStats

if TYPE_CHECKING:
    from .hybrid_manager import HybridKVCacheManager
    from .manager import KVCacheManager
    from .sequence import Sequence

__all__ = ["CellMap", "PageKind", "Picture", "SequenceRow", "TreeRow", "group_pages", "take_picture"]

MAX_SHARERS = 4
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_HEAD_TOKENS = 48
_TAIL_TOKENS = 1


class PageKind(IntEnum):
    """What a page is. A pinned page is in the prefix cache and locked there.

    CACHED_PINNED is also a page without a name that waits to be copied from, as in `ManagerStats.cached`.
    """

    FREE = 0
    OWNED = 1
    OWNED_PINNED = 2
    SHARED = 3
    SHARED_PINNED = 4
    CACHED = 5
    CACHED_PINNED = 6
    RESERVED = 7


@dataclass(frozen=True)
class SequenceRow:
    """One live sequence under the letter that its pages have in the picture; its name may be empty."""

    letter: str
    name: str
    num_tokens: int
    pages: PageArray


@dataclass(frozen=True)
class TreeRow:
    """One node of the prefix cache's tree, or a root, which has a namespace and no pages.

    parent:  the number of the row it hangs below, -1 for a root.
    is_only: it is the one child of a node, so that a long chain needs no indentation.
    age:     uses of the cache since this node was used.
    """

    parent: int
    depth: int
    is_last: bool
    is_only: bool
    namespace: str | None
    head: list[int]
    tail: list[int]
    num_tokens: int
    pages: PageArray
    locks: int
    age: int


@dataclass(frozen=True)
class Picture:
    """A manager's state. `sharers` [4, num_pages] are up to four rows of `sequences` that name a page, -1 none."""

    stats: ManagerStats
    kinds: npt.NDArray[np.uint8]
    sharers: npt.NDArray[np.int32]
    sequences: tuple[SequenceRow, ...]
    tree: tuple[TreeRow, ...] | None
    num_nodes: int

    @property
    def counts(self) -> dict[str, int]:
        """Pages of the legend, counted in the picture itself; `shared` and `pinned` overlap the others."""
        of = np.bincount(self.kinds, minlength=len(PageKind)).tolist()
        shared = of[PageKind.SHARED] + of[PageKind.SHARED_PINNED]
        return {
            "free": of[PageKind.FREE],
            "owned": of[PageKind.OWNED] + of[PageKind.OWNED_PINNED] + shared,
            "shared": shared,
            "cached": of[PageKind.CACHED] + of[PageKind.CACHED_PINNED],
            "pinned": of[PageKind.OWNED_PINNED] + of[PageKind.SHARED_PINNED] + of[PageKind.CACHED_PINNED],
            "reserved": of[PageKind.RESERVED],
        }


@dataclass(frozen=True)
class CellMap:
    """Cells of `pages_per_cell` pages: what most pages of a cell are, and the row of the sequence that owns most."""

    pages_per_cell: int
    kinds: npt.NDArray[np.uint8]
    owners: npt.NDArray[np.int32]


def take_picture(
    manager: KVCacheManager | HybridKVCacheManager, *, names: Mapping[Sequence, str] | None, max_rows: int
) -> Picture:
    """Copies what a picture of `manager` needs, under its lock; later changes do not reach it.

    Cost: a pass over the pages, the live sequences and the nodes of the tree; tokens of at most `max_rows` nodes.
    """
    budget = manager.budget
    with budget.lock:
        stats = manager.stats()
        live = [seq for ledger in budget.ledgers for seq in ledger.live.values()]
        sequences = _sequence_rows(live, names or {})
        num_named, sharers = _who_names(stats.num_pages, sequences)
        held, locked = np.zeros((2, stats.num_pages), np.bool_)
        nodes: list[Any] = []
        for cache in budget.caches:
            nodes.extend(cache.nodes())
            held |= cache.held_mask(stats.num_pages)
        for node in nodes:
            if node.parent is not None and node.locks:
                locked[node.pages] = True
        num_nodes = sum(node.parent is not None for node in nodes)
        tree = _tree_rows(nodes, max_rows) if budget.caches else None
        kinds = _kinds(budget.allocator.owner_counts(), num_named, held, locked)
        kinds[budget.allocator.reserved_pages] = PageKind.RESERVED
    return Picture(stats, kinds, sharers, sequences, tree, num_nodes)


def group_pages(picture: Picture, max_cells: int) -> CellMap:
    """The page map in at most `max_cells` cells of 1, 2, 5, 10, ... pages; a tie goes to the smaller kind."""
    num_pages = picture.kinds.shape[0]
    per_cell = _round_step(-(-num_pages // max_cells))
    owners = picture.sharers[0]
    if per_cell == 1:
        return CellMap(1, picture.kinds, owners)
    cell_of = np.arange(num_pages) // per_cell
    kinds = _most_frequent(cell_of, picture.kinds, len(PageKind), np.ones(num_pages, np.bool_))
    counts = (picture.kinds == kinds[cell_of]) & (owners >= 0)
    cell_owners = _most_frequent(cell_of, owners, max(1, len(picture.sequences)), counts)
    return CellMap(per_cell, kinds.astype(np.uint8), cell_owners.astype(np.int32))


def _round_step(at_least: int) -> int:
    step = 1
    while step * 10 < at_least:
        step *= 10
    return next(step * factor for factor in (1, 2, 5, 10) if step * factor >= at_least)


def _most_frequent(
    cell_of: npt.NDArray[np.int64], values: npt.NDArray[Any], num_values: int, counts: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """For each cell the value that most of its counted pages have, the smallest of equals."""
    num_cells = int(cell_of[-1]) + 1
    # Only pairs that occur: cells times sequences would be too many in a large pool.
    pairs, occurrences = np.unique(
        cell_of[counts] * np.int64(num_values) + values[counts].astype(np.int64), return_counts=True
    )
    # Written in this order, the last pair of a cell is its most frequent one and of equals the smallest.
    order = np.lexsort((-pairs, occurrences))
    best = np.zeros(num_cells, np.int64)
    best[pairs[order] // num_values] = pairs[order] % num_values
    return best


def _sequence_rows(seqs: list[Sequence], names: Mapping[Sequence, str]) -> tuple[SequenceRow, ...]:
    given = [names.get(seq, "").partition(" ") for seq in seqs]
    own = [first.upper() if len(first) == 1 and first.upper() in _ALPHABET else None for first, _, _ in given]
    spare = [letter for letter in _ALPHABET if letter not in own] or list(_ALPHABET)
    others = (number for number, letter in enumerate(own) if letter is None)
    letters = {number: spare[position % len(spare)] for position, number in enumerate(others)}
    return tuple(
        SequenceRow(
            letter=own[number] or letters[number],
            name=given[number][2] if own[number] else "".join(given[number]),
            num_tokens=seq.num_tokens,
            pages=_pages_of(seq),
        )
        for number, seq in enumerate(seqs)
    )


def _pages_of(seq: Sequence) -> PageArray:
    pages = np.array(seq.page_ids, np.int32)
    # A sequence may have given a page back and keep its position.
    return pages[pages >= 0]


def _who_names(
    num_pages: int, sequences: tuple[SequenceRow, ...]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    num_named = np.zeros(num_pages, np.int32)
    sharers = np.full((MAX_SHARERS, num_pages), -1, np.int32)
    for number, row in enumerate(sequences):
        seen = num_named[row.pages]
        shown = seen < MAX_SHARERS
        sharers[seen[shown], row.pages[shown]] = number
        num_named[row.pages] += 1
    return num_named, sharers


def _kinds(
    owner_counts: npt.NDArray[np.int32],
    num_named: npt.NDArray[np.int32],
    held: npt.NDArray[np.bool_],
    locked: npt.NDArray[np.bool_],
) -> npt.NDArray[np.uint8]:
    kinds = np.where(owner_counts == 0, PageKind.FREE, PageKind.CACHED_PINNED).astype(np.uint8)
    kinds[held] = PageKind.CACHED
    kinds[num_named == 1] = PageKind.OWNED
    kinds[num_named > 1] = PageKind.SHARED
    kinds[held & locked] += 1
    return kinds


def _tree_rows(nodes: list[Any], max_rows: int) -> tuple[TreeRow, ...]:
    """The first `max_rows` nodes, a parent before its children, these by their first page; and the roots between."""
    children: dict[int, list[Any]] = {}
    for node in nodes:
        if node.parent is not None:
            children.setdefault(id(node.parent), []).append(node)
    newest = max((node.last_access for node in nodes), default=0)
    roots = sorted((node for node in nodes if node.parent is None), key=lambda root: _namespace_text(root.namespace))
    rows: list[TreeRow] = []
    # What is to be drawn, the next one last: node, row of its parent, depth, is_last, is_only.
    stack = [(root, -1, 0, True, False) for root in reversed(roots)]
    num_drawn = 0
    while stack and num_drawn < max_rows:
        node, parent, depth, is_last, is_only = stack.pop()
        num_drawn += node.parent is not None
        rows.append(_tree_row(node, parent, depth, is_last, is_only, newest))
        below = sorted(children.get(id(node), ()), key=lambda child: int(child.pages[0]), reverse=True)
        is_chain = node.parent is not None and len(below) == 1
        child_depth = depth if is_chain else depth + 1
        stack.extend((child, len(rows) - 1, child_depth, child is below[0], is_chain) for child in below)
    return tuple(rows)


def _tree_row(node: Any, parent: int, depth: int, is_last: bool, is_only: bool, newest: int) -> TreeRow:
    tokens = node.tokens
    head = tokens[:_HEAD_TOKENS].tolist()
    return TreeRow(
        parent=parent,
        depth=depth,
        is_last=is_last,
        is_only=is_only,
        namespace=_namespace_text(node.namespace) if parent < 0 else None,
        head=head,
        tail=tokens[max(len(head), tokens.shape[0] - _TAIL_TOKENS) :].tolist(),
        num_tokens=tokens.shape[0],
        pages=np.array(node.pages, np.int32),
        locks=node.locks,
        age=newest - node.last_access,
    )


def _namespace_text(key: Any) -> str:
    """The namespace as its owner wrote it, in one line; the cache keeps a value together with its type."""
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], type):
        if key[0] is tuple:
            parts = ", ".join(map(_namespace_text, key[1]))
            return f"({parts},)" if len(key[1]) == 1 else f"({parts})"
        return repr(key[1])
    return repr(key)
