"""What stops a call of a tile cache midway, or comes into it, leaves books that hold."""

import gc
import linecache
import random
import signal
import sys
import threading
import time
from contextlib import ExitStack, suppress

import pytest
import torch

from pagedkv import OutOfPagesError
from pagedkv.storage.tiles.tile_cache import TileCache

PACKAGE = "pagedkv/storage/tiles/"


def make_cache():
    """Two beams that share two tiles and have one of their own each; room for little more."""
    cache = TileCache(7, 2, 3, num_beams=3, num_heads=1, num_tiles=4)
    cache.store(*tokens(1, 5), torch.tensor([0]), torch.tensor([0]))
    cache.fork(0, 1)
    cache.store(*tokens(1, 1), torch.tensor([5]), torch.tensor([1]))
    return cache


def tokens(num_rows, num_tokens):
    return torch.ones(num_rows, 1, num_tokens, 3), torch.ones(num_rows, 1, num_tokens, 3)


def read_block(cache):
    with cache.pinned_pages(None, torch.tensor([4, 2, 0])):
        pass


def write_block(cache):
    with cache.writing(1, 0, 0):
        pass


CALLS = {
    "register_tile": lambda cache: cache.register_tile(2, 0, 0),
    "store": lambda cache: cache.store(*tokens(2, 4), torch.tensor([2, 3]), torch.tensor([2, 1])),
    "get": lambda cache: cache.get(0, 0, 0, "k"),
    "get_for_write": lambda cache: cache.get_for_write(0, 0, 1, "v"),
    "pin": lambda cache: cache.pin(0, 0, 1),
    "unpin": lambda cache: cache.unpin(0, 0, 2),
    "pinned_pages": read_block,
    "writing": write_block,
    "fork": lambda cache: cache.fork(1, 2),
    "reorder": lambda cache: cache.reorder([1, 1, 0]),
    "remove": lambda cache: cache.remove(1, 0, 2),
    "remove_beam": lambda cache: cache.remove_beam(0),
    "clear": lambda cache: cache.clear(),
    "stats": lambda cache: cache.stats(),
}


class InterruptAtLine:
    """Raises KeyboardInterrupt before the line of the cache's own code that is the given one of those that run.

    Not before a `with` line, which runs once more at the end of its block: nothing is checked there by Python, so that
    the lock is always let go.
    """

    def __init__(self, number):
        self.left = number

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_filename.replace("\\", "/")
        if PACKAGE not in name and not name.endswith("contextlib.py"):
            return None
        frame.f_trace_lines = True
        return self.line

    def line(self, frame, event, argument):
        if event == "line" and not self.is_with(frame):
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.line

    def is_with(self, frame):
        return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


def interrupted(call, cache, line):
    """Whether the call came to that line, where it was stopped."""
    before = sys.gettrace()
    sys.settrace(InterruptAtLine(line))
    try:
        call(cache)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("name", CALLS)
def test_interrupt_at_every_line_leaves_books_that_hold(name):
    line, num_lines = 0, 0
    while True:
        cache = make_cache()
        cache.pin(0, 0, 2)
        was_stopped = interrupted(CALLS[name], cache, line)
        assert cache._lock.acquire(blocking=False)
        cache._lock.release()
        assert not cache._is_inside()
        by_name = sum(map(len, cache._ledger.pins.by_tile.values()))
        assert cache.stats().num_pinned == (1 if by_name else 0) + (by_name > 1)
        cache.check()
        stats = cache.stats()
        assert stats.num_used + stats.num_free == 7
        if not was_stopped:
            break
        for _ in range(by_name):
            held = next(iter(cache._ledger.pins.by_tile))
            cache.unpin(*held)
        # All pages can be had again.
        cache.clear()
        assert len(cache) == 0
        cache.store(*tokens(1, 8), torch.tensor([0]), torch.tensor([2]))
        assert len(cache) == 4
        cache.check()
        line, num_lines = line + 1, num_lines + 1
    assert num_lines > 4


def test_load_that_is_stopped_leaves_nothing_or_all(tmp_path):
    saved = make_cache()
    saved.save(tmp_path / "tiles")
    found = set()
    stopped, line = True, 0
    while stopped:
        cache = make_cache()
        cache.remove_beam(1)
        stopped = interrupted(lambda cache: cache.load(tmp_path / "tiles"), cache, line)
        cache.check()
        found.add(len(cache))
        line += 1
    assert found == {0, 3, 4}


def test_real_interrupts_at_any_moment():
    """A timer stops calls wherever they are; the books are looked at after each."""
    generator, armed = random.Random(3), False

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    num_stopped, cache, end = 0, make_cache(), time.monotonic() + 2
    try:
        while time.monotonic() < end:
            call = generator.choice(list(CALLS.values()))
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-6, 2e-4))
                with suppress(ValueError, OutOfPagesError, KeyError):
                    call(cache)
                armed = False
            except KeyboardInterrupt:
                armed = False
                num_stopped += 1
            cache.check()
            for held in list(cache._ledger.pins.by_tile):
                cache.unpin(*held)
            assert cache.stats().num_pinned == 0
            if generator.random() < 0.1:
                cache = make_cache()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert num_stopped > 20


def test_call_from_inside_of_another_is_refused(monkeypatch):
    """As from a signal handler, while tokens are being stored."""
    cache, refused = make_cache(), []
    store = cache._buffers.store

    def handled(*arguments):
        for name, call in CALLS.items():
            with pytest.raises(RuntimeError, match="must not be called from inside of one of its own calls"):
                call(cache)
            refused.append(name)
        store(*arguments)

    monkeypatch.setattr(cache._buffers, "store", handled)
    cache.store(*tokens(1, 1), torch.tensor([0]), torch.tensor([2]))
    assert refused == list(CALLS)
    cache.check()
    assert cache.stats().num_pinned == 0


def test_calls_of_other_threads_are_not_inside(monkeypatch):
    cache, done = make_cache(), []
    store = cache._buffers.store

    def slow(*arguments):
        thread.start()
        time.sleep(0.05)
        store(*arguments)

    thread = threading.Thread(target=lambda: done.append(cache.stats()))
    monkeypatch.setattr(cache._buffers, "store", slow)
    cache.store(*tokens(1, 1), torch.tensor([0]), torch.tensor([2]))
    thread.join()
    assert len(done) == 1


def test_block_that_a_finalizer_ends_inside_of_a_call_lets_go(monkeypatch):
    cache = make_cache()
    blocks = ExitStack()
    blocks.enter_context(cache.pinned_pages(None, 4))
    assert cache.stats().num_pinned == 4
    store = cache._buffers.store

    def collected(*arguments):
        blocks.close()
        store(*arguments)

    monkeypatch.setattr(cache._buffers, "store", collected)
    cache.store(*tokens(1, 1), torch.tensor([0]), torch.tensor([2]))
    assert cache.stats().num_pinned == 0
    cache.check()


def test_block_that_is_forgotten_lets_go():
    cache = make_cache()
    block = cache.pinned_pages(None, 4)
    block.__enter__()
    assert cache.stats().num_pinned == 4
    del block
    gc.collect()
    assert cache.stats().num_pinned == 0
    cache.check()


def test_error_of_the_buffers_midway_leaves_books_that_hold(monkeypatch):
    cache = make_cache()

    def copy(src, dst):
        raise OSError("no memory on the device")

    monkeypatch.setattr(cache._buffers, "copy", copy)
    with pytest.raises(OSError, match="no memory on the device"):
        cache.get_for_write(0, 0, 0, "k")
    cache.check()
    assert cache.stats().num_pinned == 0


def test_end_of_a_block_waits_for_no_other_call():
    """A finalizer may end it on a thread that holds what the other call waits for."""
    cache, is_held, done = make_cache(), threading.Event(), threading.Event()

    def hold():
        with cache._lock:
            is_held.set()
            assert done.wait(10)

    thread = threading.Thread(target=hold)
    with cache.pinned_pages(None, 4):
        thread.start()
        assert is_held.wait(10)
    assert thread.is_alive()
    done.set()
    thread.join()
    assert cache.stats().num_pinned == 0
