"""HostTileCache under interrupts at any moment, and calls that come in the midst of calls of the same thread."""

import contextlib
import gc
import itertools
import random
import signal
import sys
import time

import pytest
import torch

from pagedkv import OutOfPagesError, dequantize_kv
from pagedkv.storage.tiles.host_tile_cache import HostTileCache

TILE_SIZE, HEAD_DIM, CAPACITY = 2, 4, 8
KEYS = [(sequence, 0, tile, part) for sequence in range(3) for tile in range(3) for part in "kv"]
SECONDS = 2.0


class Alarm:
    """Raises KeyboardInterrupt, or does something else, a random short time after the beginning of the block."""

    def __init__(self, source, act, longest=4e-4):
        self.source, self.act, self.longest = source, act, longest
        self.is_on = False

    def __enter__(self):
        signal.signal(signal.SIGALRM, self._ring)
        self.is_on = True
        signal.setitimer(signal.ITIMER_REAL, self.source.uniform(1e-6, self.longest))

    def __exit__(self, *_):
        self.is_on = False

    def _ring(self, *_):
        if self.is_on:
            self.is_on = False
            self.act()


@pytest.fixture(autouse=True)
def no_alarm_afterwards():
    previous = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def interrupt():
    raise KeyboardInterrupt


def tiles_of(keys, versions):
    numbers = [next(versions) * len(KEYS) + KEYS.index(key) for key in keys]
    return torch.stack([torch.full((TILE_SIZE, HEAD_DIM), float(number)) for number in numbers])


def checked(key, tile):
    """Every tile is one that was put under this key, or under that of the sequence it was inherited from."""
    low, high = (bound.item() for bound in tile.aminmax())
    assert low == high, f"torn tile at {key}: {low} and {high}"
    assert KEYS[int(low) % len(KEYS)][1:] == key[1:], f"foreign tile at {key}: {low}"


def programs(cache, source, versions, path):
    def put():
        key = source.choice(KEYS)
        cache.put(key, tiles_of([key], versions)[0])

    def put_batch():
        keys = source.sample(KEYS, source.randint(1, CAPACITY))
        tiles = tiles_of(keys, versions)
        cache.put_batch(keys, tiles)

    def get_batch():
        keys = [key for key in source.choices(KEYS, k=5) if key in cache]
        for key, tile in zip(keys, cache.get_batch(keys), strict=True):
            checked(key, tile)

    def look():
        key = source.choice(KEYS)
        with cache.pinned(key) as view:
            checked(key, view)

    def pin():
        key = source.choice(KEYS)
        cache.pin(key)
        cache.unpin(key)

    def fork():
        cache.remove_sequence(1)
        cache.fork(0, 1)

    changes = [put] * 2 + [put_batch] * 6 + [get_batch, look, pin, fork, cache.clear]
    changes += [
        lambda: cache.reorder([source.randrange(3) for _ in range(3)]),
        lambda: cache.remove(source.choice(KEYS)),
    ]
    return [*changes, lambda: cache.load(path)]


def holds(cache):
    stats = cache.stats()
    assert stats.num_tiles + stats.num_free + len(cache._slots.views) >= cache.capacity
    assert len(set(cache._slots.free)) == len(cache._slots.free) == stats.num_free
    assert not cache._turns.reads
    assert cache._turns.put is None
    for key in KEYS:
        tile = cache.get(key)
        if tile is not None:
            checked(key, tile)


# An interrupt inside `open` itself leaves the file to the collector, which says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("seed", range(2))
def test_interrupts_leave_the_books_whole(tmp_path, seed):
    source, versions = random.Random(seed), itertools.count(1)
    cache = HostTileCache(CAPACITY, TILE_SIZE, HEAD_DIM)
    path = tmp_path / "tiles"
    cache.put_batch(KEYS[:4], tiles_of(KEYS[:4], versions))
    cache.save(path)
    steps = programs(cache, source, versions, path)
    num_interrupts, until = 0, time.monotonic() + SECONDS
    while time.monotonic() < until:
        try:
            with contextlib.suppress(KeyError, OutOfPagesError, ValueError), Alarm(source, interrupt):
                for _ in range(3):
                    source.choice(steps)()
        except KeyboardInterrupt:
            num_interrupts += 1
            holds(cache)
    assert num_interrupts > 20
    cache._slots.pins_of_key.clear()  # a pin whose call was interrupted may be there or not
    cache.clear()
    keys = [(7, 0, tile, "k") for tile in range(CAPACITY - len(cache._slots.views))]
    cache.put_batch(keys, torch.zeros(len(keys), TILE_SIZE, HEAD_DIM))
    assert len(cache) == len(keys) >= CAPACITY - 1


def test_a_signal_handler_may_read_and_not_change_in_the_midst_of_a_call():
    source, versions = random.Random(5), itertools.count(1)
    cache = HostTileCache(CAPACITY, TILE_SIZE, HEAD_DIM)
    refusals, num_changes = [], 0

    def handler():
        nonlocal num_changes
        try:
            key = source.choice(KEYS)
            tile = cache.get(key)
            if tile is not None:
                checked(key, tile)
            cache.remove_sequence(source.randrange(3))
            num_changes += 1
        except RuntimeError as error:
            refusals.append(str(error))

    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        with Alarm(source, handler):
            for _ in range(3):
                keys = source.sample(KEYS, CAPACITY)
                cache.put_batch(keys, tiles_of(keys, versions))
        holds(cache)
    assert num_changes
    assert refusals
    assert all("of the same thread" in text for text in refusals)


def test_an_interrupted_write_costs_the_tiles_that_it_writes_over_and_no_others(monkeypatch):
    cache = HostTileCache(3, TILE_SIZE, HEAD_DIM)
    versions = itertools.count(1)
    cache.put_batch(KEYS[:3], tiles_of(KEYS[:3], versions))

    def torn(slots, content):
        cache._tiles.values[slots[0], 0] = -1
        interrupt()

    with monkeypatch.context() as patched:
        patched.setattr(cache._tiles, "write_batch", torn)
        with pytest.raises(KeyboardInterrupt):
            cache.put_batch(KEYS[:2], tiles_of(KEYS[:2], versions))
    assert [key in cache for key in KEYS[:3]] == [False, False, True]
    assert cache.get(KEYS[0]) is None
    holds(cache)
    cache.put_batch(KEYS[:3], tiles_of(KEYS[:3], versions))


def test_an_interrupt_while_a_put_waits_for_readers_costs_nothing():
    cache = HostTileCache(1, TILE_SIZE, HEAD_DIM)
    versions = itertools.count(1)
    cache.put(KEYS[0], tiles_of(KEYS[:1], versions)[0])
    read_batch = cache._tiles.read_batch

    def read_meanwhile(slots, out):
        with pytest.raises(RuntimeError, match="must not wait for the call of the same thread"):
            cache.put(KEYS[0], torch.zeros(TILE_SIZE, HEAD_DIM))
        read_batch(slots, out)

    cache._tiles.read_batch = read_meanwhile
    checked(KEYS[0], cache.get_batch(KEYS[:1])[0])
    holds(cache)
    assert KEYS[0] in cache


def test_a_view_that_the_collector_ends_in_the_midst_of_a_change_frees_its_slot_once():
    def abandon(cache):
        """Enters a block whose end only the collector finds."""

        def block():
            with cache.pinned(KEYS[0]):
                yield

        ring = [block()]
        next(ring[0])
        ring.append(ring)

    was_enabled, thresholds = gc.isenabled(), gc.get_threshold()
    gc.collect()
    gc.freeze()  # or each collection would go through all that other tests have imported
    try:
        for num_allocations in range(1, 150):
            gc.disable()
            cache = HostTileCache(4, TILE_SIZE, HEAD_DIM)
            cache.put_batch(KEYS[:2], tiles_of(KEYS[:2], itertools.count(1)))
            gc.collect()
            abandon(cache)
            gc.set_threshold(num_allocations, 1000, 1000)
            gc.enable()
            cache.remove(KEYS[0])
            gc.disable()
            gc.collect()
            cache.put_batch(KEYS[2:5], tiles_of(KEYS[2:5], itertools.count(1)))
            holds(cache)
            assert (len(cache), cache.stats().num_tiles) == (4, 4)
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        if was_enabled:
            gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bfloat16])
def test_get_gives_the_tile_of_its_key_whatever_a_handler_does_meanwhile(dtype):
    """At every instruction of a get, a put that would evict the tile comes in between: refused, or before, or after."""
    key, other = KEYS[0], KEYS[2]
    numbers = set()
    dtype_in = torch.float32 if dtype == torch.int8 else dtype
    kept, put_meanwhile = (torch.full((TILE_SIZE, HEAD_DIM), number, dtype=dtype_in) for number in (1.0, -100.0))

    def run(position):
        cache = HostTileCache(1, TILE_SIZE, HEAD_DIM, dtype=dtype)
        cache.put(key, kept)
        count = 0

        def trace(frame, event, _):
            nonlocal count
            if "storage/tiles/host_" not in frame.f_code.co_filename:
                return None
            frame.f_trace_opcodes = True
            count += 1
            if count == position:
                sys.settrace(None)
                with contextlib.suppress(RuntimeError):
                    cache.put(other, put_meanwhile)
            return trace

        sys.settrace(trace)
        try:
            read = cache.get(key)
        finally:
            sys.settrace(None)
        if read is not None:
            values = dequantize_kv(read.values[:, None], read.scales[:, None]) if dtype == torch.int8 else read
            numbers.update(values.float().unique().tolist())
        assert cache.stats().num_tiles == len(cache) == 1
        return count >= position

    previous = sys.gettrace()
    try:
        num_positions = 1
        while run(num_positions):
            num_positions += 1
    finally:
        sys.settrace(previous)
    assert num_positions > 20
    assert numbers == {1.0}
