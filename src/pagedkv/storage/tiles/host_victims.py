"""Which keys of a HostTileCache go so that others find room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import filterfalse, islice

import numpy as np

from ...errors import OutOfPagesError
from .host_slots import HostSlots, Key, SlotIds

__all__ = ["choose_victims"]


def choose_victims(slots: HostSlots, keys: Sequence[Key], held: SlotIds) -> list[Key]:
    """The keys to evict, oldest first, so that each of `keys`, which name `held`, has a slot; none of `keys`.

    Raises: OutOfPagesError when all that may be evicted is not enough.
    """
    missing = len(keys) - len(slots.free)
    missing -= int(slots.own_slots(held).sum()) if missing > 0 else 0
    if missing <= 0:
        return []
    # Keys that are not there cannot be among those that go.
    wanted = set(keys) if (held >= 0).any() else set()
    if not _may_all_go(slots):
        return _victims_among_pins(slots, wanted, held, missing)
    victims = list(islice(filterfalse(wanted.__contains__, slots.by_key), missing))
    if len(victims) < missing:
        raise _out_of_pages(slots, len(held), len(victims))
    return victims


def _may_all_go(slots: HostSlots) -> bool:
    """Whether every slot that is not free has exactly one name, and no pin or view."""
    return not slots.has_pins and len(slots.by_key) == slots.capacity - len(slots.free)


def _victims_among_pins(slots: HostSlots, wanted: set[Key], held: SlotIds, missing: int) -> list[Key]:
    own_pins = _own_pins(slots, wanted)
    named, counts = np.unique(held[held >= 0], return_counts=True)
    names_left = dict(zip(named.tolist(), (slots.num_names[named] - counts).tolist(), strict=True))
    victims: list[Key] = []
    num_freed = 0
    for key, slot in _unwanted(slots, wanted):
        if slots.num_views[slot] or slots.num_pins[slot] > own_pins.get(slot, 0):
            continue
        victims.append(key)
        left = names_left[slot] = names_left.get(slot, int(slots.num_names[slot])) - 1
        num_freed += not left
        if num_freed == missing:
            return victims
    raise _out_of_pages(slots, len(held), num_freed)


def _unwanted(slots: HostSlots, wanted: set[Key]) -> Iterator[tuple[Key, int]]:
    return ((key, slot) for key, slot in slots.by_key.items() if key not in wanted)


def _own_pins(slots: HostSlots, wanted: set[Key]) -> dict[int, int]:
    own: dict[int, int] = {}
    for key, count in slots.pins_of_key.items():
        slot = slots.by_key.get(key) if key in wanted else None
        if slot is not None:
            own[slot] = own.get(slot, 0) + count
    return own


def _out_of_pages(slots: HostSlots, num_needed: int, num_evictable: int) -> OutOfPagesError:
    pinned = (slots.num_pins + slots.num_views) > 0
    num_sequences = len({key[0] for key, slot in slots.by_key.items() if pinned[slot]})
    return OutOfPagesError(num_needed, len(slots.free), num_evictable, slots.num_pinned, num_sequences)
