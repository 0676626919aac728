"""Every exception this package raises on purpose.

PagedKVError
├── OutOfPagesError          the pool has no room for what was asked; nothing changed
├── IntegrityError           the bookkeeping of pages contradicts itself
├── BackendUnavailableError  the back end asked for cannot run this call here
└── TierError                a storage tier failed
    ├── CorruptPageError         the bytes of a page are not the bytes that were saved
    └── TierUnavailableError     the tier did not answer in time

Misuse is a ValueError (wrong shape, range, state) or a TypeError (wrong type, wrong dtype).
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "CorruptPageError",
    "IntegrityError",
    "OutOfPagesError",
    "PagedKVError",
    "TierError",
    "TierUnavailableError",
]


class PagedKVError(Exception):
    """Base of every error that is not plain misuse."""


class OutOfPagesError(PagedKVError):
    """The pool has no room; nothing was changed, and the call may be repeated after closing sequences.

    Attributes count pages: `needed`, `free`, `evictable` (cached by the prefix cache alone) and `pinned`
    (named by `num_sequences` live sequences).
    """

    def __init__(self, needed: int, free: int, evictable: int, pinned: int = 0, num_sequences: int = 0) -> None:
        self.needed = needed
        self.free = free
        self.evictable = evictable
        self.pinned = pinned
        self.num_sequences = num_sequences
        sequences = "1 sequence" if num_sequences == 1 else f"{num_sequences} sequences"
        pages = "1 page" if needed == 1 else f"{needed} pages"
        super().__init__(
            f"cannot allocate {pages}: {free} free, {evictable} evictable, {pinned} pinned by {sequences}."
        )

    def __reduce__(self) -> tuple[type[OutOfPagesError], tuple[int, int, int, int, int]]:
        return type(self), (self.needed, self.free, self.evictable, self.pinned, self.num_sequences)


class IntegrityError(PagedKVError):
    """A sentence that must hold of the cache's state does not; the message is the sentence and the evidence."""


class BackendUnavailableError(PagedKVError):
    """The back end asked for cannot run this call here; the message says why, and what else was tried."""


class TierError(PagedKVError):
    """A storage tier failed."""


class CorruptPageError(TierError):
    """The bytes of a page are not the bytes that were saved."""


class TierUnavailableError(TierError):
    """A storage tier did not answer in time."""
