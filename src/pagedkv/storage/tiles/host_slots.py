"""The books of a HostTileCache: which key names which slot, what is pinned, what is free. No lock and no data."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from .host_sequences import Key, KeysBySequence

__all__ = ["HostSlots", "Key", "SlotIds"]

SlotIds = npt.NDArray[np.int64]


class HostSlots:
    """Slots [0, capacity), each free, named by one key or by several, reserved by a writer, or only viewed.

    by_key:       slot by key, the least recently used key first.
    pins_of_key:  pins stay with their key while it is overwritten, removed or put again.
    views:        slot by view; a slot stays as it is while there is a view of it.
    ended_views:  views to be taken off. They come here at any moment and on any thread, by the collector even in the
                  midst of a change of the same thread; so nothing else happens then.
    is_rewritten: by slot, whether its tile is being written over, so that its content is no tile at present.
    The rest follows from these, and `mend` works it out anew after a change that was interrupted:
    free:         slots without name and view; the longest free is taken first.
    num_names, num_views, num_pins: by slot: its keys; its views; the pins of its keys.
    is_whole:     False while a change goes on; that of a put begins with `reserve` and ends with `publish` or `mend`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.by_key: OrderedDict[Key, int] = OrderedDict()
        self.pins_of_key: dict[Key, int] = {}
        self.views: dict[object, int] = {}
        self.ended_views: deque[object] = deque()
        self.is_rewritten = np.zeros(capacity, np.bool_)
        self.is_whole = True
        self.num_names, self.num_views, self.num_pins = np.zeros((3, capacity), np.int64)
        self.free = list(range(capacity))
        self._sequences = KeysBySequence(self.by_key)
        # Of a call's own slots: how many of its keys name each. 0 between calls.
        self._num_own = np.zeros(capacity, np.int64)

    def mend(self) -> None:
        """Drops the keys of tiles that were only partly written over, and makes the books whole if they are not."""
        if self.is_whole:
            return
        for key in [key for key, slot in self.by_key.items() if self.is_rewritten[slot]]:
            del self.by_key[key]
        named, viewed = (np.array(list(slots.values()), np.int64) for slots in (self.by_key, self.views))
        self.num_names[:] = np.bincount(named, minlength=self.capacity)
        self.num_views[:] = np.bincount(viewed, minlength=self.capacity)
        self.num_pins[:] = 0
        for key, count in self.pins_of_key.items():
            if key in self.by_key:
                self.num_pins[self.by_key[key]] += count
        self._sequences.start_anew(self.by_key)
        unused = (self.num_names == 0) & (self.num_views == 0)
        self.free = np.flatnonzero(unused).tolist()
        self._num_own[:] = 0
        self.is_rewritten[:] = False
        self.is_whole = True

    def of_sequence(self, sequence: int) -> list[Key]:
        """The keys of one sequence, in the order in which they came to be."""
        return self._sequences.of_sequence(sequence)

    def find(self, keys: Sequence[Key]) -> SlotIds:
        """The slot that each key names, -1 for none."""
        if self.by_key.keys().isdisjoint(keys):
            return np.full(len(keys), -1, np.int64)
        try:
            return self.find_all(keys)
        except KeyError:
            return np.array([self.by_key.get(key, -1) for key in keys], np.int64)

    def find_all(self, keys: Sequence[Key]) -> SlotIds:
        """The slot that each key names; raises KeyError for the first that names none."""
        return np.fromiter(map(self.by_key.__getitem__, keys), np.int64, len(keys))

    def touch(self, keys: Iterable[Key]) -> None:
        """Makes keys that name slots the most recently used, in this order."""
        deque(map(self.by_key.move_to_end, keys), maxlen=0)

    def name(self, keys: Sequence[Key], slots: SlotIds) -> None:
        """Lets distinct keys that name nothing name these slots, as the most recently used in this order."""
        was_whole, self.is_whole = self.is_whole, False
        self._set_slots(keys, slots)
        np.add.at(self.num_names, slots, 1)
        self._move_pins(keys, slots, 1)
        self._sequences.add(keys)
        self.is_whole = was_whole

    def drop(self, keys: Sequence[Key]) -> int:
        """Takes n distinct keys off their slots and returns n; a slot is free without name and view."""
        was_whole, self.is_whole = self.is_whole, False
        slots = np.fromiter(map(self.by_key.pop, keys), np.int64, len(keys))
        self._take_names(keys, slots)
        self.is_whole = was_whole
        return len(keys)

    def inherit(self, parent_of: dict[int, int]) -> None:
        """Gives each sequence the tiles that its parent has now, in the place of its own."""
        was_whole, self.is_whole = self.is_whole, False
        parents = [(child, key) for child, parent in parent_of.items() for key in self.of_sequence(parent)]
        shared = self.find([key for _, key in parents])
        # Held meanwhile, so that a slot is not freed between its old name and its new one.
        np.add.at(self.num_views, shared, 1)
        for child in parent_of:
            self.drop(self.of_sequence(child))
        self.name([(child, *key[1:]) for child, key in parents], shared)
        np.subtract.at(self.num_views, shared, 1)
        self.is_whole = was_whole

    def pin(self, key: Key, change: int) -> None:
        """Counts pins of a key up or down."""
        was_whole, self.is_whole = self.is_whole, False
        count = self.pins_of_key.get(key, 0) + change
        if count:
            self.pins_of_key[key] = count
        else:
            del self.pins_of_key[key]
        slot = self.by_key.get(key)
        if slot is not None:
            self.num_pins[slot] += change
        self.is_whole = was_whole

    def start_view(self, view: object, slot: int) -> None:
        """Keeps the slot as it is until the view is in `ended_views`."""
        was_whole, self.is_whole = self.is_whole, False
        self.views[view] = slot
        self.num_views[slot] += 1
        self.is_whole = was_whole

    def settle(self) -> None:
        """Takes off the views that ended, and makes the books whole."""
        while self.ended_views:
            was_whole, self.is_whole = self.is_whole, False
            slot = self.views.pop(self.ended_views[0], None)
            if slot is not None:
                self.num_views[slot] -= 1
                self._free_unused(np.array([slot]))
            # Last: an interrupt before leaves it here for the next time.
            self.ended_views.popleft()
            self.is_whole = was_whole
        self.mend()

    def own_slots(self, held: SlotIds) -> npt.NDArray[np.bool_]:
        """Which of a call's distinct keys, that name the slots `held` (-1: none), may write where they are.

        The slot must be named by keys of the call alone and be seen by nobody; where several of them name one, the last
        may.
        """
        was_whole, self.is_whole = self.is_whole, False
        named = held[held >= 0]
        np.add.at(self._num_own, named, 1)
        is_own: npt.NDArray[np.bool_] = (
            (held >= 0) & (self._num_own[held] == self.num_names[held]) & (self.num_views[held] == 0)
        )
        # What is written last stays.
        self._num_own[named] = np.flatnonzero(held >= 0)
        is_own &= self._num_own[held] == np.arange(len(held))
        self._num_own[named] = 0
        self.is_whole = was_whole
        return is_own

    def reserve(self, held: SlotIds) -> SlotIds:
        """Slots to be written for distinct keys, which name `held` (-1: none): begins a put.

        As few as can be are those that the keys name now, marked as rewritten: the readers of others need not wait.
        """
        self.is_whole = False
        is_own = self.own_slots(held)
        is_own &= is_own.cumsum() <= len(held) - len(self.free)
        slots = held.copy()
        # Those that others may still read, freed last, are taken last.
        num_taken = len(held) - int(is_own.sum())
        slots[~is_own] = self.free[:num_taken]
        del self.free[:num_taken]
        self.is_rewritten[slots[is_own]] = True
        return slots

    def reserve_all(self) -> None:
        """All slots are to be written: begins a put of all content."""
        self.is_whole = False
        self.is_rewritten[:] = True

    def publish(self, keys: Sequence[Key], held: SlotIds, slots: SlotIds) -> None:
        """Lets distinct keys, which name `held` (-1: none), name `slots` as the most recently used in this order.

        Ends the put that has reserved and written the slots.
        """
        if (held < 0).all():
            self.name(keys, slots)
        else:
            self._rename(keys, held, slots)
        self.is_rewritten[:] = False
        self.is_whole = True

    def publish_all(self, keys: Sequence[Key], slots: SlotIds) -> None:
        """Lets distinct keys, which may share slots, be all that there is: ends the put that `reserve_all` begins."""
        self.by_key.clear()
        self._set_slots(keys, slots)
        self.is_rewritten[:] = False
        self.mend()

    def _rename(self, keys: Sequence[Key], held: SlotIds, slots: SlotIds) -> None:
        moved = np.flatnonzero((held >= 0) & (held != slots))
        moved_keys = keys if moved.size == len(keys) else [keys[i] for i in moved.tolist()]
        self._set_slots(moved_keys, slots[moved])
        self.num_names[slots[moved]] += 1
        self._move_pins(moved_keys, slots[moved], 1)
        self._take_names(moved_keys, held[moved])
        new = np.flatnonzero(held < 0)
        if new.size:
            self.name([keys[i] for i in new.tolist()], slots[new])
        self.touch(keys)

    def start_rewriting(self, slot: int) -> None:
        """The tile of the slot is about to be written over where it is; until `end_rewriting`."""
        self.is_whole = False
        self.is_rewritten[slot] = True

    def end_rewriting(self, slot: int) -> None:
        """It is written over."""
        self.is_rewritten[slot] = False
        self.is_whole = True

    def are_distinct(self, slots: SlotIds) -> bool:
        """Whether no slot stands in `slots` twice."""
        last = np.empty(self.capacity, np.int64)
        rows = np.arange(len(slots))
        last[slots] = rows
        return bool((last[slots] == rows).all())

    def is_exclusive(self, slot: int) -> bool:
        """Whether the slot has one name and no view."""
        return bool(self.num_names[slot] == 1 and not self.num_views[slot])

    @property
    def num_tiles(self) -> int:
        """Slots with a name."""
        return int(np.count_nonzero(self.num_names))

    @property
    def num_pinned(self) -> int:
        """Slots that are pinned by a key or by a view."""
        return int(np.count_nonzero(self.num_pins + self.num_views))

    @property
    def has_pins(self) -> bool:
        """Whether a key or a view is pinned."""
        return bool(self.pins_of_key) or bool(self.views)

    def _set_slots(self, keys: Sequence[Key], slots: SlotIds) -> None:
        by_key = self.by_key
        # Sooner done than by `update`, which OrderedDict has from the mappings at large.
        for key, slot in zip(keys, slots.tolist(), strict=True):
            by_key[key] = slot

    def _take_names(self, keys: Sequence[Key], slots: SlotIds) -> None:
        np.subtract.at(self.num_names, slots, 1)
        self._move_pins(keys, slots, -1)
        self._free_unused(slots)

    def _move_pins(self, keys: Sequence[Key], slots: SlotIds, sign: int) -> None:
        if self.pins_of_key:
            np.add.at(self.num_pins, slots, [sign * self.pins_of_key.get(key, 0) for key in keys])

    def _free_unused(self, slots: SlotIds) -> None:
        """Adds those of the slots, which may repeat, that have lost their last name or view."""
        unused = slots[(self.num_names[slots] == 0) & (self.num_views[slots] == 0)]
        if unused.size > 1:
            marks = np.zeros(self.capacity, np.bool_)
            marks[unused] = True
            unused = np.flatnonzero(marks)
        self.free += unused.tolist()
