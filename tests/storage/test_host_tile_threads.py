"""HostTileCache under threads: every tile that anyone reads is whole, and one that was put under that very key.

A tile says in each element whose it is: sequence, head, tile, part and version as one number that float32 holds
exactly. A torn tile has two numbers, a foreign one the number of another key.
"""

import contextlib
import random
import threading
import time

import pytest
import torch

from pagedkv import OutOfPagesError
from pagedkv.storage.tiles.host_tile_cache import HostTileCache

TILE_SIZE, HEAD_DIM, CAPACITY = 8, 64, 24
NUM_SEQUENCES, NUM_TILES = 4, 6
KEYS = [(sequence, 0, index, part) for sequence in range(NUM_SEQUENCES) for index in range(NUM_TILES) for part in "kv"]
# Forks share tiles, so a tile may come from any sequence; where in it and which part it is stays.
NUM_PLACES = 2 * NUM_TILES
SECONDS = 1.5


def place(key):
    return 2 * key[2] + "kv".index(key[3])


def content(key, version):
    return torch.full((TILE_SIZE, HEAD_DIM), float(version * NUM_PLACES + place(key)))


class WrongTileError(Exception):
    pass


def check(key, tile):
    low, high = (bound.item() for bound in tile.aminmax())
    if low != high:
        raise WrongTileError(f"torn tile at {key}: {low} and {high}")
    if low % NUM_PLACES != place(key):
        raise WrongTileError(f"foreign tile at {key}: {low}")
    return low


def test_the_check_finds_torn_and_foreign_tiles():
    cache = HostTileCache(4, TILE_SIZE, HEAD_DIM)
    for key in KEYS[:3]:
        cache.put(key, content(key, version=3))
        check(key, cache.get(key))
    slots = cache._slots.by_key
    cache._tiles.values[slots[KEYS[0]], -1, -1] += NUM_PLACES
    with pytest.raises(WrongTileError, match="torn"):
        check(KEYS[0], cache.get(KEYS[0]))
    slots[KEYS[1]] = slots[KEYS[2]]
    with pytest.raises(WrongTileError, match="foreign"):
        check(KEYS[1], cache.get(KEYS[1]))


class Threads:
    """Runs functions of a random source again and again until the time is over or one of them fails."""

    def __init__(self, *steps, seconds=SECONDS):
        self.errors, self.counts = [], [0] * len(steps)
        self.until = time.monotonic() + seconds
        threads = [threading.Thread(target=self._run, args=(index, step)) for index, step in enumerate(steps)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
        if self.errors:
            raise self.errors[0]
        assert all(self.counts)

    def _run(self, index, step):
        source = random.Random(index)
        try:
            while time.monotonic() < self.until and not self.errors:
                step(source)
                self.counts[index] += 1
        except BaseException as error:  # noqa: BLE001 - raised again by the thread of the test
            self.errors.append(error)


def reading(cache):
    def get(source):
        key = source.choice(KEYS)
        tile = cache.get(key)
        if tile is not None:
            check(key, tile)

    def get_batch(source):
        keys = [source.choice(KEYS) for _ in range(source.randint(1, 12))]
        keys = [key for key in keys if key in cache]
        try:
            tiles = cache.get_batch(keys)
        except KeyError:
            return
        for key, tile in zip(keys, tiles, strict=True):
            check(key, tile)

    def look(source):
        key = source.choice(KEYS)
        try:
            with cache.pinned(key) as view:
                seen = check(key, view)
                time.sleep(0.0005)
                assert check(key, view) == seen
        except KeyError:
            pass

    return [get, get_batch, look]


def writing(cache):
    version = [0]

    def put(source):
        version[0] += 1
        key = source.choice(KEYS)
        cache.put(key, content(key, version[0]))

    def put_batch(source):
        version[0] += 1
        keys = source.sample(KEYS, source.randint(1, CAPACITY // 2))
        cache.put_batch(keys, torch.stack([content(key, version[0]) for key in keys]))

    def fork(source):
        src, dst = source.sample(range(NUM_SEQUENCES), 2)
        cache.remove_sequence(dst)
        # Another writer may have put a tile there in between.
        with contextlib.suppress(ValueError):
            cache.fork(src, dst)

    def reorder(source):
        cache.reorder([source.randrange(NUM_SEQUENCES) for _ in range(NUM_SEQUENCES)])

    def remove(source):
        cache.remove(source.choice(KEYS))

    changes = [put] * 6 + [put_batch] * 12 + [fork, reorder, remove]

    def write(source):
        source.choice(changes if source.random() > 0.01 else [lambda source: cache.clear()])(source)

    return write


def counts_are_right(cache):
    slots = cache._slots
    stats = cache.stats()
    assert stats.num_tiles + stats.num_free == CAPACITY
    assert stats.num_pinned == 0
    assert not cache._turns.reads
    assert not set(slots.free) & set(slots.by_key.values())
    assert len(set(slots.free)) == len(slots.free)
    assert sum(slots.num_names) == len(slots.by_key) == len(cache)


@pytest.mark.parametrize("num_writers", [1, 2])
def test_readers_never_see_half_a_tile_or_another_ones(num_writers):
    evicted = []
    cache = HostTileCache(CAPACITY, TILE_SIZE, HEAD_DIM, on_evict=lambda key, tile: evicted.append(check(key, tile)))
    writers = [writing(cache)] * num_writers
    Threads(*reading(cache), *reading(cache), *writers)
    counts_are_right(cache)
    assert evicted
    assert cache.stats().hits


def test_batches_are_seen_whole_or_not_at_all():
    """Of one put_batch over a full cache, a get_batch sees all tiles or none."""
    cache = HostTileCache(CAPACITY, TILE_SIZE, HEAD_DIM)
    keys = KEYS[:CAPACITY]
    version = [0]

    def put(source):
        version[0] += 1
        cache.put_batch(keys, torch.stack([content(key, version[0]) for key in keys]))

    def get(source):
        chosen = source.sample(keys, 5)
        numbers = [check(key, tile) for key, tile in zip(chosen, cache.get_batch(chosen), strict=True)]
        assert len({number // NUM_PLACES for number in numbers}) == 1
        assert cache.get(chosen[0]) is not None

    put(None)
    Threads(put, get, get, get, seconds=1)
    counts_are_right(cache)
    assert cache.stats().misses == 0


def test_evicting_leaves_what_others_pin():
    cache = HostTileCache(CAPACITY, TILE_SIZE, HEAD_DIM)

    def hold(source):
        key = source.choice(KEYS)
        try:
            cache.pin(key)
        except KeyError:
            return
        with cache.pinned(key) as view:
            seen = check(key, view)
            time.sleep(0.001)
            assert check(key, view) == seen
            assert key in cache
        cache.unpin(key)

    version = [0]

    def evict(source):
        version[0] += 1
        keys = source.sample(KEYS, CAPACITY - 2)
        with contextlib.suppress(OutOfPagesError):
            cache.put_batch(keys, torch.stack([content(key, version[0]) for key in keys]))

    Threads(hold, hold, hold, evict, seconds=1)
    counts_are_right(cache)
    assert cache.stats().evictions


def test_a_put_waits_for_the_batch_that_reads_its_slot(monkeypatch):
    """The one slot there is is being read: the put neither fails nor writes into the read."""
    cache = HostTileCache(1, TILE_SIZE, HEAD_DIM)
    key, other = KEYS[0], KEYS[3]
    cache.put(key, content(key, 1))
    is_reading, may_end = threading.Event(), threading.Event()
    read_batch = cache._tiles.read_batch

    def slow_read(slots, out):
        is_reading.set()
        assert may_end.wait(timeout=10)
        read_batch(slots, out)

    monkeypatch.setattr(cache._tiles, "read_batch", slow_read)
    read, was_put = [], []
    reader = threading.Thread(target=lambda: read.append(cache.get_batch([key])))
    writer = threading.Thread(target=lambda: was_put.append(cache.put(other, content(other, 2))))
    reader.start()
    assert is_reading.wait(timeout=10)
    writer.start()
    writer.join(timeout=0.1)
    assert not was_put
    may_end.set()
    for thread in (reader, writer):
        thread.join(timeout=10)
    assert check(key, read[0][0]) == place(key) + NUM_PLACES
    assert key not in cache
    check(other, cache.get(other))


def test_a_put_that_does_not_wait_for_readers_is_found(monkeypatch):
    """The stress bites: without the marks of readers, a batch is torn or foreign."""
    cache = HostTileCache(1, TILE_SIZE, HEAD_DIM)
    key, other = KEYS[0], KEYS[3]
    cache.put(key, content(key, 1))
    read_batch = cache._tiles.read_batch

    def read_after_a_put(slots, out):
        cache._turns.reads.clear()
        cache.put(other, content(other, 2))
        read_batch(slots, out)

    monkeypatch.setattr(cache._tiles, "read_batch", read_after_a_put)
    with pytest.raises(WrongTileError, match="foreign"):
        check(key, cache.get_batch([key])[0])


def test_a_reader_waits_for_the_tile_that_is_written_again_and_for_no_other(monkeypatch):
    cache = HostTileCache(2, TILE_SIZE, HEAD_DIM)
    key, other = KEYS[0], KEYS[3]
    cache.put_batch([key, other], torch.stack([content(key, 1), content(other, 1)]))
    is_writing, may_end = threading.Event(), threading.Event()
    write_batch = cache._tiles.write_batch

    def slow_write(slots, tiles):
        is_writing.set()
        assert may_end.wait(timeout=10)
        write_batch(slots, tiles)

    monkeypatch.setattr(cache._tiles, "write_batch", slow_write)
    read = []
    writer = threading.Thread(target=lambda: cache.put_batch([key], content(key, 2)[None]))
    readers = [
        threading.Thread(target=lambda: read.append(cache.get(key))),
        threading.Thread(target=lambda: read.append(cache.get_batch([other, key])[1])),
    ]
    writer.start()
    assert is_writing.wait(timeout=10)
    for reader in readers:
        reader.start()
    assert check(other, cache.get(other)) == place(other) + NUM_PLACES
    assert not read
    may_end.set()
    for thread in (writer, *readers):
        thread.join(timeout=10)
    assert [check(key, tile) for tile in read] == [place(key) + 2 * NUM_PLACES] * 2


def test_a_write_that_fails_gives_its_slots_back(monkeypatch):
    cache = HostTileCache(CAPACITY, TILE_SIZE, HEAD_DIM)
    cache.put(KEYS[0], content(KEYS[0], 1))

    def failing(slots, tiles):
        raise MemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(cache._tiles, "write_batch", failing)
        with pytest.raises(MemoryError, match="no memory"):
            cache.put_batch(KEYS[:3], torch.zeros(3, TILE_SIZE, HEAD_DIM))
    counts_are_right(cache)
    assert check(KEYS[0], cache.get(KEYS[0])) == place(KEYS[0]) + NUM_PLACES
    assert KEYS[1] not in cache
    cache.put_batch(KEYS[:3], torch.stack([content(key, 2) for key in KEYS[:3]]))
