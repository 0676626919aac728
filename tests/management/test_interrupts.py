"""A manager whose calls are ended by an interrupt at each bytecode in turn, and what the next calls find."""

import os
from pathlib import Path

import numpy as np
import pytest

import pagedkv.management
from pagedkv import KVCacheManager, RadixCache, check_integrity
from pagedkv.testing.interrupts import Interrupter

FILES = Path(pagedkv.management.__file__).parent
# Signals are handled between calls, never between a lock's release and the end of its block; a trace knows no better.
NOT_INTERRUPTED = {str(FILES / name) for name in ("whole_call.py", "settle.py")}
PAGE_SIZE, NUM_PAGES = 2, 24
# How many bytecodes lie between two interrupts; 1 for all of them.
STRIDE = int(os.environ.get("PAGEDKV_INTERRUPT_STRIDE", "7"))


def interrupter_at(number, only=None):
    """Of the management's bytecodes, or of those of one file."""

    def is_meant(code):
        name = code.co_filename
        return name == only if only else name.startswith(str(FILES)) and name not in NOT_INTERRUPTED

    return Interrupter(number, is_meant)


class Tier:
    """Keeps the ids of saved pages, and knows which copies it has."""

    def __init__(self):
        self.saved = {}

    def save(self, pages):
        self.saved[len(self.saved)] = pages.tolist()
        return len(self.saved) - 1

    def load(self, ticket, pages):
        assert len(self.saved[ticket]) == len(pages)

    def drop(self, ticket):
        del self.saved[ticket]


class World:
    """Some sequences in every state, and what their tokens are."""

    def __init__(self, cache, window=None):
        if cache == "python":
            cache = RadixCache(PAGE_SIZE, core="python")
        self.manager = KVCacheManager(NUM_PAGES, PAGE_SIZE, cache, window=window, tier=Tier(), watermark=1)
        self.seqs = {}
        self.grow("first", [1, 2, 3, 4, 5])
        self.grow("sharing", [1, 2, 3, 4, 9, 9, 9])
        self.seqs["fork"] = self.seqs["first"].fork()
        self.grow("duplicate", [7, 7, 8, 8], found=[])
        self.grow("copying", [7, 7, 8, 8, 6], found=[])
        self.grow("gone", [5, 5, 6, 6, 7, 7])
        self.seqs.pop("gone").close()
        self.grow("away", [3, 3, 3, 3])
        self.manager.swap_out(self.seqs["away"])
        self.grow("dropped", [3, 3, 4, 4, 4])
        self.manager.drop(self.seqs["dropped"])
        self.pin = self.manager.pin([5, 5, 6, 6])
        self.open_ones = [seq for seq in self.seqs.values() if seq.state == "on pages"]
        self.known = {name: seq.token_ids for name, seq in self.seqs.items()}
        self.manager.batch(self.open_ones)

    def grow(self, name, ids, found=None):
        seq = self.seqs[name] = self.manager.open(ids if found is None else found)
        seq.append(len(ids) - seq.num_tokens)
        seq.commit(ids[seq.num_committed :])


def fill(world):
    seq = world.manager.open([])
    waiting = len(world.manager._budget.copy_sources)
    seq.append(2 * (world.manager.num_free_pages + world.manager.num_evictable_pages - waiting - 1))
    seq.close()


CALLS = {
    "open": lambda world: world.manager.open([5, 5, 6, 6, 1, 1]),
    "append": lambda world: world.seqs["fork"].append(3),
    "append with evictions": fill,
    "commit": lambda world: world.seqs["sharing"].commit([8]),
    "commit a full page of a fork": lambda world: world.seqs["first"].commit([6]),
    "fork": lambda world: world.seqs["copying"].fork(),
    "truncate": lambda world: world.seqs["sharing"].truncate(3),
    "close": lambda world: world.seqs["first"].close(),
    "close a duplicate": lambda world: world.seqs["copying"].close(),
    "close what is away": lambda world: world.seqs["away"].close(),
    "batch": lambda world: world.manager.batch(world.open_ones, 3),
    "commit a step": lambda world: world.manager.commit(world.open_ones, [6, 8, 6, 9, 9]),
    "reorder": lambda world: world.manager.reorder(world.open_ones[:2], [1, 1, 1]),
    "pin": lambda world: world.manager.pin([1, 2, 3, 4]),
    "unpin": lambda world: world.pin.unpin(),
    "swap out": lambda world: (world.manager.take_copies(), world.manager.swap_out(world.seqs["first"])),
    "drop": lambda world: world.manager.drop(world.seqs["first"]),
    "swap in": lambda world: world.manager.swap_in(world.seqs["away"]),
    "swap in what was dropped": lambda world: world.manager.swap_in(world.seqs["dropped"]),
    "evict": lambda world: world.manager.evict(),
    "take copies": lambda world: world.manager.take_copies(),
}


def check(world):
    """Sequences hold what they held, whole tokens of it, and everything can go on and end."""
    manager = world.manager
    manager.stats()
    check_integrity(manager)
    for name, seq in world.seqs.items():
        ids, known = seq.token_ids, world.known[name]
        shared = min(len(ids), len(known))
        assert ids[:shared] == known[:shared], name
    manager.evict()
    for seq in list(manager.ledger.live.values()):
        if seq not in world.seqs.values():
            seq.close()  # what the interrupted call did not return any more
    for seq in list(manager.ledger.live.values()):
        if seq.state != "on pages":
            again = manager.swap_in(seq)
            if again.size:
                seq.append(again.size)
                seq.commit(again)
        pending = seq.num_tokens - seq.num_committed
        if pending:
            seq.truncate(seq.num_committed)
        check_integrity(manager)
    step = list(manager.ledger.live.values())
    manager.batch(step)
    check_integrity(manager)
    for seq in step:
        seq.truncate(seq.num_committed)
        seq.append(1)
    manager.take_copies()
    for seq in step:
        seq.close()
    for pin in list(manager.ledger.pins.values()):
        pin.unpin()
    check_integrity(manager)
    manager.evict()
    assert manager.num_free_pages == NUM_PAGES
    assert not manager._tier.saved or len(manager._tier.saved) == 1  # a copy whose ticket never came back


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cache", [True, "python", "hashed", False])
def test_books_agree_after_an_interrupt_anywhere(cache, name):
    number, stride = 0, STRIDE if cache is True else 4 * STRIDE
    while True:
        world = World(cache)
        interrupter = interrupter_at(number)
        try:
            with interrupter:
                CALLS[name](world)
        except KeyboardInterrupt:
            pass
        check(world)
        if not interrupter.has_struck:
            break
        number += stride
    assert number > 20


def test_settling_can_be_interrupted_too():
    number = 0
    while True:
        world = World(True)
        try:
            with interrupter_at(60):
                world.seqs["first"].append(9)
        except KeyboardInterrupt:
            pass
        assert world.manager._budget.is_torn
        interrupter = interrupter_at(number, only=str(FILES / "settle.py"))
        try:
            with interrupter:
                world.manager.stats()
        except KeyboardInterrupt:
            pass
        check(world)
        if not interrupter.has_struck:
            break
        number += STRIDE


def test_sequences_keep_their_pages_and_the_cache_is_empty():
    manager = KVCacheManager(NUM_PAGES, PAGE_SIZE)
    kept = manager.open([])
    kept.append(4)
    kept.commit(np.array([1, 2, 3, 4]))
    pages = kept.page_ids
    number = 0
    while not manager._budget.is_torn:
        number += 10
        with pytest.raises(KeyboardInterrupt), interrupter_at(number):
            manager.open([1, 2, 3, 4])
    assert manager.open([1, 2, 3, 4]).num_cached_tokens == 0
    assert kept.page_ids == pages
    assert kept.token_ids == (1, 2, 3, 4)
    kept.append(2)
    kept.commit([5, 6])
    assert manager.open([1, 2, 3, 4, 5, 6]).num_cached_tokens == 6
    check_integrity(manager)
