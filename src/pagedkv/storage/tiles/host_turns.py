"""Who may touch a HostTileCache when: one change at a time, batches copied outside the lock, tiles never half-seen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from .host_slots import HostSlots, Key, SlotIds

__all__ = ["BatchPut", "BatchRead", "HostTurns"]

# Whoever waits looks again this often: an interrupt may have come between a change and the word that tells of it.
_SECONDS_BETWEEN_LOOKS = 0.2

Result = TypeVar("Result")


class BatchRead:
    """A batch that this thread copies out of `slots`: whoever takes one of them waits before he writes to it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.slots: SlotIds | None = None


class BatchPut:
    """A batch that this thread copies in."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.has_begun = False
        self.is_written = False


class HostTurns:
    """One lock over the books, and what goes on outside of it.

    lock:   of whoever looks at the books or copies a single tile. A thread may come in again, by a callback, a signal
            handler or a finalizer in the midst of a call of its own: it may read then, and not change anything.
    reads:  batches that are being copied out.
    put:    the one that is being copied in, None for none. Nothing but pins changes in the books meanwhile.
    depth:  how many calls are in the midst of the books. Who has the lock and sees one is called by it, and must not
            even move a key in the order of use: the other call may be going through them.

    An interrupt may come between any two lines. So what goes on is noted before it begins and struck out in one step,
    and the books say themselves whether they are whole.
    """

    def __init__(self, slots: HostSlots) -> None:
        self.lock = threading.RLock()
        self.reads: set[BatchRead] = set()
        self.put: BatchPut | None = None
        self._slots = slots
        self.depth = 0
        self._changed = threading.Condition(self.lock)

    def look(self, step: Callable[[], Result]) -> Result:
        """What `step` gives, which looks at the books and does not wait; nothing changes meanwhile."""
        with self.lock:
            depth = self.depth
            try:
                self.depth = depth + 1
                return step()
            finally:
                self.depth = depth

    def look_when_whole(self, key: Key, step: Callable[[int | None], Result], *, pins: bool = False) -> Result:
        """What `step` gives for the slot that a key names, None for none, once no put writes over it.

        pins: `step` counts pins or views.
        """

        def attempt() -> tuple[Result] | None:
            slot = self._slots.by_key.get(key)
            is_whole = slot is None or not self._slots.is_rewritten[slot]
            return (step(slot),) if is_whole else None

        while (result := (self.pin if pins else self.look)(attempt)) is None:
            self.await_tile()
        return result[0]

    def pin(self, step: Callable[[], Result]) -> Result:
        """What `step` gives, which counts pins and does not wait."""
        with self.lock:
            self._refuse_while_busy()
            if self.put is None:
                self._slots.settle()
            return self.look(step)

    def change(self, step: Callable[[], Result]) -> Result:
        """What `step` gives, which changes the books in this thread's turn, when no put goes on; it does not wait."""
        with self.lock:
            self._refuse_while_busy()
            self.await_put()
            return self.look(step)

    def read(self, find: Callable[[], SlotIds], copy: Callable[[SlotIds], None]) -> None:
        """Copies the tiles of the slots that `find` gives, outside the lock; nobody writes to them meanwhile."""
        read = BatchRead()
        try:
            while (slots := self.look(lambda: self._start_read(read, find))) is None:
                self.await_tile()
            copy(slots)
        finally:
            self.reads.discard(read)
            with self.lock:
                self._changed.notify_all()

    def write(
        self,
        start: Callable[[], SlotIds],
        fill: Callable[[SlotIds], None],
        publish: Callable[[SlotIds], None],
    ) -> None:
        """Takes this thread's turn for a put: `start` reserves slots, `fill` writes them outside the lock, and
        `publish` lets keys name them."""
        put = BatchPut()
        try:
            slots = self.change(lambda: self._start(put, start))
            self._await_reads(slots)
            put.has_begun = True
            fill(slots)
            put.is_written = True
        finally:
            with self.lock:
                try:
                    if self.put is put:
                        self._end(put, lambda: publish(slots))
                finally:
                    if self.put is put:
                        self.put = None
                    self._changed.notify_all()

    def await_put(self) -> None:
        """Waits until no put goes on and the books are whole; within a call that has seen to it, does nothing.

        When:   under the lock.
        Raises: RuntimeError inside the put of this thread, which would wait for itself.
        """
        if self.depth:
            return
        while self.put is not None:
            self._refuse_own(self.put.thread)
            self._changed.wait(_SECONDS_BETWEEN_LOOKS)
        self._slots.settle()

    def await_tile(self) -> None:
        """Waits for the end of a put that writes over a tile which the caller asks for; not under the lock."""
        with self.lock:
            if self.depth:
                raise RuntimeError(
                    "a tile must not be read in the midst of a put of the same thread that writes over it (by a signal "
                    "handler or a finalizer), got a call that does."
                )
            self.await_put()

    def _start_read(self, read: BatchRead, find: Callable[[], SlotIds]) -> SlotIds | None:
        slots = find()
        if self._slots.is_rewritten[slots].any():
            return None
        read.slots = slots
        self.reads.add(read)
        return slots

    def _start(self, put: BatchPut, start: Callable[[], SlotIds]) -> SlotIds:
        self.put = put
        return start()

    def _end(self, put: BatchPut, publish: Callable[[], None]) -> None:
        if put.is_written:
            publish()
            return
        if not put.has_begun:
            self._slots.is_rewritten[:] = False
        self._slots.mend()

    def _await_reads(self, slots: SlotIds) -> None:
        """Waits until nobody reads these slots. No new reader comes to them, since no key names them or all wait."""
        with self.lock:
            while reads := [read for read in tuple(self.reads) if _overlap(read.slots, slots)]:
                for read in reads:
                    self._refuse_own(read.thread)
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)

    def _refuse_while_busy(self) -> None:
        if self.depth:
            raise RuntimeError(
                "the cache must not be changed in the midst of a call of the same thread (by on_evict, a signal "
                "handler or a finalizer), got a call that does."
            )

    def _refuse_own(self, thread: int) -> None:
        if thread == threading.get_ident():
            raise RuntimeError(
                "a call must not wait for the call of the same thread that it came in the midst of (by a signal "
                "handler or a finalizer), got one that would."
            )


def _overlap(read: SlotIds | None, written: SlotIds) -> bool:
    return read is not None and bool(np.isin(read, written).any())
