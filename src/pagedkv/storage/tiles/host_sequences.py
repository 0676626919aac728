"""Which keys the sequences of a HostTileCache have, worked out when somebody asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain

__all__ = ["Key", "KeysBySequence"]

Key = tuple[int, int, int, str]

_FEW = 1024


class KeysBySequence:
    """The keys of `by_key` by sequence, in the order in which they came to be.

    A put says which keys are new and no more, since few callers ever ask for a sequence; keys that go are passed over
    when one is asked for. What is kept stays below twice the keys there are, and some.
    """

    def __init__(self, by_key: Mapping[Key, int]) -> None:
        self._by_key = by_key
        self._new: list[Sequence[Key]] = []
        self._num_kept = 0
        self._sorted: dict[int, dict[Key, None]] = {}

    def add(self, keys: Sequence[Key]) -> None:
        """Takes note of keys that came to be, in this order."""
        self._new.append(keys)
        self._num_kept += len(keys)
        if self._num_kept > self._most():
            self._forget_gone()

    def of_sequence(self, sequence: int) -> list[Key]:
        """The keys that one sequence has now."""
        self._sort()
        keys = [key for key in self._sorted.get(sequence, ()) if key in self._by_key]
        if keys:
            self._sorted[sequence] = dict.fromkeys(keys)
        else:
            self._sorted.pop(sequence, None)
        return keys

    def start_anew(self, keys: Collection[Key]) -> None:
        """Takes these keys for all there are."""
        self._sorted.clear()
        self._new[:] = [list(keys)]
        self._num_kept = len(keys)

    def _most(self) -> int:
        return 2 * len(self._by_key) + _FEW

    def _forget_gone(self) -> None:
        """Forgets keys that went: first where whole puts went, which is soon seen, then one by one."""
        present = self._by_key.keys()
        self._new[:] = [keys for keys in self._new if not present.isdisjoint(keys)]
        if self._count() > self._most():
            self._sort()
            for sequence in list(self._sorted):
                self.of_sequence(sequence)
        self._num_kept = self._count()

    def _count(self) -> int:
        return sum(map(len, self._new)) + sum(map(len, self._sorted.values()))

    def _sort(self) -> None:
        for key in chain.from_iterable(self._new):
            of_sequence = self._sorted.setdefault(key[0], {})
            # A key that was dropped and came again stands where it came last.
            of_sequence.pop(key, None)
            of_sequence[key] = None
        self._new.clear()
