"""Traces of a manager's calls, one JSON object a line, and their replay; the format is in docs/inspect.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, TypeVar

import numpy as np

from ..errors import OutOfPagesError
from ..management import KVCacheManager, Sequence
from ..management.draw_text import page_ranges

__all__ = ["Replay", "Step", "parse_trace"]

Result = TypeVar("Result")

_TYPE_NAMES = {int: "a whole number", str: "text", list: "a list of token ids", bool: "true or false"}
# Of each op, the keys it must have and those it may have.
_REQUIRED: dict[str, dict[str, type]] = {
    "pool": {"num_pages": int, "page_size": int},
    "open": {"seq": str, "tokens": list},
    "append": {"seq": str, "num_tokens": int},
    "commit": {"seq": str, "tokens": list},
    "fork": {"seq": str, "to": str},
    "truncate": {"seq": str, "num_tokens": int},
    "close": {"seq": str},
    "evict": {},
}
_OPTIONAL: dict[str, dict[str, type | None]] = {
    "pool": {"prefix_cache": bool, "eviction": str},
    "open": {"namespace": None},
    "evict": {"num_pages": int},
}


@dataclass(frozen=True)
class Step:
    """One line of a trace: `where` names it in messages, `keys` are those of its op."""

    where: str
    op: str
    keys: dict[str, Any]
    note: str


def parse_trace(source: str, lines: Iterable[str]) -> list[Step]:
    """The steps of a trace, the first of which is the pool; empty lines are skipped.

    Raises: ValueError that names `source` and the line for what is not a step.
    """
    steps = [
        _parse_line(f"{source}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not steps:
        raise ValueError(f"{source} must have at least one line, got nothing. Begin with the op pool.")
    for number, step in enumerate(steps):
        if (step.op == "pool") != (number == 0):
            wanted = "must be the op pool" if number == 0 else "must not be the op pool again"
            raise ValueError(f"{step.where} {wanted}, got {step.op}. A trace is of one pool, its first line.")
    return steps


def _parse_line(where: str, line: str) -> Step:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{where} must be a JSON object, got {_shortened(line)} ({reason}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a JSON object, got {_shortened(line)}.")
    op, note = found.pop("op", None), found.pop("note", "")
    if not isinstance(op, str) or op not in _REQUIRED:
        raise ValueError(f"{where}: op must be {_listed(_REQUIRED)}, got {op!r}.")
    if not isinstance(note, str):
        raise ValueError(f"{where}: note must be text, got {note!r}.")
    required, optional = _REQUIRED[op], _OPTIONAL.get(op, {})
    for key, kind in required.items():
        if key not in found:
            raise ValueError(f"{where}: {op} must have the key {key} ({_TYPE_NAMES[kind]}), got none.")
    for key, value in found.items():
        if key not in required and key not in optional:
            known = _listed([*required, *optional, "note"])
            raise ValueError(f"{where}: the keys of {op} must be {known}, got {key!r}.")
        wanted = required.get(key) or optional.get(key)
        if wanted is not None and type(value) is not wanted:
            raise ValueError(f"{where}: {key} must be {_TYPE_NAMES[wanted]}, got {_shortened(repr(value))}.")
    return Step(where, op, found, note)


class Replay:
    """A manager to which the steps of a trace are done, one `run` a step; no keys and values are behind it.

    Letters: a sequence whose name is one letter has this letter in pictures; the others get the next that is left, and
             keep it until the end of the trace.
    """

    def __init__(self, pool: Step) -> None:
        self._sequences: dict[str, Sequence] = {}
        self._letters: dict[str, str] = {}
        options = dict(pool.keys)
        num_pages = options.pop("num_pages")
        self._manager = _located(pool, lambda: KVCacheManager(num_pages, **options))

    @property
    def manager(self) -> KVCacheManager:
        """The manager as the steps so far have left it."""
        return self._manager

    @property
    def names(self) -> dict[Sequence, str]:
        """Letter and name of each open sequence, for `draw`."""
        letters = self._letters
        return {
            seq: letters[name] if name.upper() == letters[name] else f"{letters[name]} {name}"
            for name, seq in self._sequences.items()
        }

    def run(self, step: Step) -> str:
        """Does one step and says what came of it; a pool that is full is an answer too.

        Raises: ValueError that names the line of a step that cannot be done.
        """
        do: Callable[..., str] = getattr(self, f"_{step.op}")
        return _located(step, lambda: do(**step.keys))

    def _open(self, seq: str, tokens: list[int], namespace: Any = None) -> str:
        if seq in self._sequences:
            raise ValueError(f"seq must be a name that is not open, got {seq!r}. Close it first.")
        opened = self._manager.open(tokens, _as_tuple(namespace))
        self._add(seq, opened)
        return f"open {seq}, {_plural(len(tokens), 'token')}: {opened.num_cached_tokens:,} cached"

    def _append(self, seq: str, num_tokens: int) -> str:
        growing = self._named(seq)
        before = growing.page_ids
        try:
            growing.append(num_tokens)
        except OutOfPagesError as error:
            return f"append {_plural(num_tokens, 'token')} to {seq}: {error}"
        src, dst = (ids.tolist() for ids in self._manager.take_copies())
        done = [f"page {page} copied to {copy}" for page, copy in zip(src, dst, strict=True)]
        new = growing.page_ids[len(before) :]
        done.extend([f"new {_pages(new)}"] if new else [])
        return f"append {_plural(num_tokens, 'token')} to {seq}: {', '.join(done) or 'room in its last page'}"

    def _commit(self, seq: str, tokens: list[int]) -> str:
        before = self._manager.stats().published
        self._named(seq).commit(tokens)
        num_published = self._manager.stats().published - before
        return f"commit {_plural(len(tokens), 'token')} of {seq}: {_plural(num_published, 'page')} published"

    def _fork(self, seq: str, to: str) -> str:
        if to in self._sequences:
            raise ValueError(f"to must be a name that is not open, got {to!r}. Close it first.")
        self._add(to, self._named(seq).fork())
        return f"fork {seq} to {to}"

    def _truncate(self, seq: str, num_tokens: int) -> str:
        cut = self._named(seq)
        before = cut.page_ids
        cut.truncate(num_tokens)
        given_back = before[len(cut.page_ids) :]
        said = f"gives back {_pages(given_back)}" if given_back else "keeps its pages"
        return f"truncate {seq} to {_plural(num_tokens, 'token')}: {said}"

    def _close(self, seq: str) -> str:
        self._named(seq).close()
        del self._sequences[seq]
        return f"close {seq}"

    def _evict(self, num_pages: int | None = None) -> str:
        return f"evict: {_plural(self._manager.evict(num_pages), 'page')} freed"

    def _named(self, seq: str) -> Sequence:
        if seq not in self._sequences:
            raise ValueError(f"seq must be an open sequence, got {seq!r}. Open it first.")
        return self._sequences[seq]

    def _add(self, name: str, seq: Sequence) -> None:
        self._sequences[name] = seq
        if name in self._letters:
            return
        taken = set(self._letters.values())
        if name.upper() in ascii_uppercase and len(name) == 1 and name.upper() not in taken:
            self._letters[name] = name.upper()
        else:
            spare = (letter for letter in ascii_uppercase if letter not in taken)
            self._letters[name] = next(spare, ascii_uppercase[len(self._letters) % len(ascii_uppercase)])


def _located(step: Step, call: Callable[[], Result]) -> Result:
    try:
        return call()
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{step.where}: {error}") from error


def _as_tuple(namespace: Any) -> Any:
    """JSON has no tuples: a list is one."""
    return tuple(map(_as_tuple, namespace)) if isinstance(namespace, list) else namespace


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _pages(pages: tuple[int, ...]) -> str:
    return f"page{'' if len(pages) == 1 else 's'} {page_ranges(np.array(pages))}"


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 40 else f"{text[:39]}…"
