"""A hybrid manager whose calls are ended by an interrupt: its parts are equal again, and all goes on."""

import pytest
from test_interrupts import STRIDE, Tier, interrupter_at

from pagedkv import HybridKVCacheManager, LayerGroup, check_integrity

GROUPS = [LayerGroup((0,), None, 4), LayerGroup((1,), 5, 2)]
NUM_PAGES = 60


class World:
    """Sequences in every state."""

    def __init__(self):
        self.manager = HybridKVCacheManager(NUM_PAGES, GROUPS, tier=Tier())
        self.seqs = {}
        for name, ids in {
            "long": list(range(17)),
            "same": [*range(9), 50, 51, 52, 53],
            "away": [3] * 9,
            "dropped": [4] * 11,
        }.items():
            self.grow(name, ids)
        self.seqs["fork"] = self.seqs["same"].fork()
        self.manager.swap_out(self.seqs["away"])
        self.manager.drop(self.seqs["dropped"])
        self.known = {name: seq.token_ids for name, seq in self.seqs.items()}

    def grow(self, name, ids):
        seq = self.seqs[name] = self.manager.open(ids)
        for token in ids[seq.num_tokens :]:
            seq.append(1)
            seq.commit([token])


def step(world):
    world.manager.batch([world.seqs["long"]])
    world.manager.commit([world.seqs["long"]], [17])


CALLS = {
    "open": lambda world: world.manager.open([*range(9), 7, 7]),
    "append": lambda world: world.seqs["fork"].append(5),
    "commit": lambda world: (world.seqs["long"].append(1), world.seqs["long"].commit([17])),
    "step": step,
    "fork": lambda world: world.seqs["long"].fork(),
    "truncate": lambda world: world.seqs["same"].truncate(12),
    "swap out": lambda world: world.manager.swap_out(world.seqs["long"]),
    "swap in": lambda world: world.manager.swap_in(world.seqs["away"]),
    "drop": lambda world: world.manager.drop(world.seqs["long"]),
    "swap in what was dropped": lambda world: world.manager.swap_in(world.seqs["dropped"]),
    "reorder": lambda world: world.manager.reorder([world.seqs["same"], world.seqs["fork"]], [1, 1]),
    "close": lambda world: world.seqs["same"].close(),
}


def check(world):
    manager = world.manager
    manager.take_copies()
    check_integrity(manager)
    for name, seq in world.seqs.items():
        if seq.is_closed:
            continue
        if seq.state == "on pages":
            try:
                seq.append(1)
            except ValueError as error:
                assert "swap_in" in str(error) or seq.is_closed  # noqa: PT017
            else:
                seq.truncate(seq.num_committed)
        if seq.state == "closed":
            seq.close()  # what one part has begun
            continue
        if seq.state != "on pages":
            again = manager.swap_in(seq)
            if again.size:
                seq.append(again.size)
                seq.commit(again)
        if seq.num_tokens > seq.num_committed:
            seq.truncate(seq.num_committed)
        counts = {(part.num_tokens, part.num_committed, part.state) for part in seq.parts}
        assert len(counts) == 1, name
        ids, known = seq.token_ids, world.known[name]
        shared = min(len(ids), len(known))
        assert ids[:shared] == known[:shared], name
        manager.take_copies()
        check_integrity(manager)
    for managed in manager.managers:
        for part in list(managed.ledger.live.values()):
            part.close()
    manager.evict()
    check_integrity(manager)
    assert manager.num_free_pages == NUM_PAGES


@pytest.mark.parametrize("name", CALLS)
def test_parts_are_equal_after_an_interrupt_anywhere(name):
    number = 0
    while True:
        world = World()
        interrupter = interrupter_at(number)
        try:
            with interrupter:
                CALLS[name](world)
        except KeyboardInterrupt:
            pass
        check(world)
        if not interrupter.has_struck:
            break
        number += 8 * STRIDE
    assert number > 100
