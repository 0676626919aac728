"""The books of a HostTileCache: which key names which slot, what may be evicted, what is free. No lock and no data."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable

import numpy as np

from ...errors import OutOfPagesError

__all__ = ["HostSlots", "Key"]

Key = tuple[int, int, int, str]


class HostSlots:
    """Slots [0, capacity), each free, named by one key or by several, reserved by a writer, or only viewed.

    by_key:       slot by key, the least recently used key first.
    free:         slots without name and view; the longest free is taken first.
    num_names, num_views, num_pins: by slot: its keys; its pinned views; the pins of its keys.
    num_reads:    by slot, whether a batch is being read from it, and how many. It says nothing of who owns the slot:
                  whoever takes a slot waits until these reads are over before he writes to it.
    pins_of_key:  pins stay with their key while it is overwritten, removed or put again.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_reads = np.zeros(capacity, np.int64)
        self.num_names = [0] * capacity
        self.num_views = [0] * capacity
        self.num_pins = [0] * capacity
        self.pins_of_key: dict[Key, int] = {}
        self.by_key: OrderedDict[Key, int] = OrderedDict()
        self.free = deque(range(capacity))
        self._by_sequence: dict[int, dict[Key, None]] = {}

    def of_sequence(self, sequence: int) -> list[Key]:
        """The keys of one sequence, in the order in which they came to be."""
        return list(self._by_sequence.get(sequence, ()))

    def name(self, key: Key, slot: int) -> None:
        """Lets a key that names nothing name the slot, as the most recently used."""
        self.by_key[key] = slot
        self.num_names[slot] += 1
        if self.pins_of_key:
            self.num_pins[slot] += self.pins_of_key.get(key, 0)
        keys = self._by_sequence.get(key[0])
        if keys is None:
            keys = self._by_sequence[key[0]] = {}
        keys[key] = None

    def drop(self, key: Key) -> None:
        """Takes the name off its slot; the slot is free when that was the last name and nobody views it."""
        slot = self.by_key.pop(key)
        self.num_names[slot] -= 1
        if self.pins_of_key:
            self.num_pins[slot] -= self.pins_of_key.get(key, 0)
        keys = self._by_sequence[key[0]]
        del keys[key]
        if not keys:
            del self._by_sequence[key[0]]
        if not self.num_names[slot]:
            self._free_if_unused(slot)

    def pin(self, key: Key, change: int) -> None:
        """Counts pins of a key up or down."""
        count = self.pins_of_key.get(key, 0) + change
        if count:
            self.pins_of_key[key] = count
        else:
            del self.pins_of_key[key]
        slot = self.by_key.get(key)
        if slot is not None:
            self.num_pins[slot] += change

    def end_view(self, slot: int) -> None:
        """One view of the slot less."""
        self.num_views[slot] -= 1
        self._free_if_unused(slot)

    def victims(self, keys: Collection[Key]) -> list[Key]:
        """The keys to evict, oldest first, so that a tile for each of `keys` has a slot. None of `keys` is among them.

        Raises: OutOfPagesError when all that may be evicted is not enough.
        """
        if len(keys) <= len(self.free):
            return []
        own = self._own_names(keys)
        missing = len(keys) - len(self.free) - len(self._exclusive(own))
        if missing <= 0:
            return []
        own_pins = self._own_pins(keys)
        names_left = {slot: self.num_names[slot] - count for slot, count in own.items()}
        victims: list[Key] = []
        num_freed = 0
        for key, slot in self.by_key.items():
            if key in keys or self.num_views[slot] or self.num_pins[slot] > own_pins.get(slot, 0):
                continue
            victims.append(key)
            left = names_left[slot] = names_left.get(slot, self.num_names[slot]) - 1
            num_freed += not left
            if num_freed == missing:
                return victims
        raise OutOfPagesError(len(keys), len(self.free), num_freed, self.num_pinned, self._num_pinned_sequences())

    def reserve(self, keys: Collection[Key]) -> tuple[list[int], list[Key]]:
        """A slot for each of `keys`, and those of `keys` that lost their tile to that: slots that others may still
        read are taken last. After the victims are dropped there are enough.
        """
        free = self.free
        slots = [free.popleft() for _ in range(min(len(keys), len(free)))]
        num_missing = len(keys) - len(slots)
        if not num_missing:
            return slots, []
        taken = self._exclusive(self._own_names(keys))[:num_missing]
        of_taken = set(taken)
        lost = [key for key in keys if self.by_key.get(key) in of_taken]
        for key in lost:
            self.drop(key)
        slots.extend(free.popleft() for _ in taken)
        return slots, lost

    def publish(self, keys: Iterable[Key], slots: Iterable[int]) -> None:
        """Lets each key name its reserved slot, in the place of what it named; the last is the most recently used."""
        # Local names: taking and naming slots for 4,096 known keys is 0.95 ms this way, 1.33 ms with attributes.
        by_key, num_names, num_views, pins = self.by_key, self.num_names, self.num_views, self.pins_of_key
        find, move_to_end, free = by_key.get, by_key.move_to_end, self.free.append
        for key, slot in zip(keys, slots, strict=True):
            old = find(key)
            if old is None:
                self.name(key, slot)
                continue
            by_key[key] = slot
            move_to_end(key)
            num_names[slot] += 1
            num_names[old] -= 1
            if pins and key in pins:
                self.num_pins[slot] += pins[key]
                self.num_pins[old] -= pins[key]
            if not num_names[old] and not num_views[old]:
                free(old)

    def is_exclusive(self, slot: int) -> bool:
        """Whether the slot has one name, and nobody sees into it now."""
        return self.num_names[slot] == 1 and not self.num_views[slot] and not self.num_reads[slot]

    @property
    def num_tiles(self) -> int:
        """Slots with a name."""
        return sum(map(bool, self.num_names))

    @property
    def num_pinned(self) -> int:
        """Slots that are pinned by a key or by a view."""
        return sum(bool(pins or views) for pins, views in zip(self.num_pins, self.num_views, strict=True))

    @property
    def has_pins(self) -> bool:
        """Whether a key or a view is pinned."""
        return bool(self.pins_of_key) or any(self.num_views)

    def _num_pinned_sequences(self) -> int:
        return len({key[0] for key, slot in self.by_key.items() if self.num_pins[slot] or self.num_views[slot]})

    def _own_names(self, keys: Iterable[Key]) -> dict[int, int]:
        own: dict[int, int] = {}
        for key in keys:
            slot = self.by_key.get(key)
            if slot is not None:
                own[slot] = own.get(slot, 0) + 1
        return own

    def _own_pins(self, keys: Collection[Key]) -> dict[int, int]:
        own: dict[int, int] = {}
        for key, count in self.pins_of_key.items():
            slot = self.by_key.get(key) if key in keys else None
            if slot is not None:
                own[slot] = own.get(slot, 0) + count
        return own

    def _exclusive(self, own: dict[int, int]) -> list[int]:
        """Of the slots that some keys name, by how many: those that nobody else names or views."""
        return [slot for slot, count in own.items() if self.num_names[slot] == count and not self.num_views[slot]]

    def _free_if_unused(self, slot: int) -> None:
        if not self.num_names[slot] and not self.num_views[slot]:
            self.free.append(slot)
