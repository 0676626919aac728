"""Which pages are free, and how many owners each of the others has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import OutOfPagesError
from ..shapes import check_int

__all__ = ["FreeRuns", "PageAllocator", "PageArray", "PageIds"]

PageArray = npt.NDArray[np.int32]
PageIds = Sequence[int] | npt.NDArray[np.integer[Any]]


class FreeRuns(NamedTuple):
    """How the free pages lie: `num_runs` runs of neighbouring ids, `longest` pages in the longest."""

    num_runs: int
    longest: int


class PageAllocator:
    """Hands out the pages num_reserved..num_pages-1 and counts their owners; a page without owners is free.

    num_reserved: pages 0..num_reserved-1 are never handed out. They are for a caller that needs pages of nobody's: the
            slots that padded rows of a captured graph write to, or the id that fills unused entries of a table.
    Owns:   the counts. A reserved page has one owner for ever.
    Order:  a stack that keeps runs together: a fresh pool gives 0, 1, 2, ..., and pages given back together come out
            again together and in the same order. `sort_free` restores the order of ids, in an idle moment.
    Cost:   allocate and release: one copy of the ids and one write a page, whatever the size of the pool.
    Raises: ValueError, TypeError for pages that are out of range, reserved, named twice in one call or free; nothing
            changed.

    >>> allocator = PageAllocator(4)
    >>> pages = allocator.allocate(3)
    >>> pages.tolist(), allocator.num_free
    ([0, 1, 2], 1)
    >>> allocator.retain(pages[:1])
    >>> allocator.release(pages).tolist(), allocator.num_free
    ([1, 2], 3)
    """

    def __init__(self, num_pages: int, num_reserved: int = 0) -> None:
        check_int("num_pages", num_pages, minimum=1)
        check_int("num_reserved", num_reserved, minimum=0)
        if num_pages > 2**31 - 1:
            raise ValueError(f"num_pages must be below 2**31 (page ids are int32), got {num_pages}.")
        if num_reserved >= num_pages:
            raise ValueError(f"num_reserved must be below {num_pages} (num_pages), got {num_reserved}.")
        self._num_owners = np.zeros(num_pages, np.int32)
        self._num_owners[:num_reserved] = 1
        self._num_reserved = num_reserved
        # The top of the stack is at num_free - 1, so it is filled with the last page first.
        self._free_stack = np.zeros(num_pages, np.int32)
        self._num_free = num_pages - num_reserved
        self._free_stack[: self._num_free] = np.arange(num_pages - 1, num_reserved - 1, -1, dtype=np.int32)
        # Written before it is read in each check for duplicates; its content between calls means nothing.
        self._order = np.zeros(num_pages, np.int32)
        self._num_extra_owners = 0

    @property
    def num_pages(self) -> int:
        """All pages, free or not, reserved ones included."""
        return self._num_owners.shape[0]

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return self._num_free

    @property
    def num_reserved(self) -> int:
        """Pages that are never handed out."""
        return self._num_reserved

    @property
    def reserved_pages(self) -> PageArray:
        """The pages that are never handed out, 0..num_reserved-1."""
        return np.arange(self._num_reserved, dtype=np.int32)

    @property
    def num_extra_owners(self) -> int:
        """Owners beyond the first, over all pages; 0 says that no page is shared."""
        return self._num_extra_owners

    def num_owners(self, page: int) -> int:
        """Owners of one page, 0 when it is free."""
        check_int("page", page, minimum=0)
        if page >= self.num_pages:
            raise ValueError(f"page must be in 0..{self.num_pages - 1}, got {page}.")
        return int(self._num_owners.item(page))

    def owner_counts(self) -> npt.NDArray[np.int32]:
        """Owners of every page, a copy [num_pages]."""
        return self._num_owners.copy()

    def owner_counts_of(self, pages: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
        """Owners of some pages, a copy [n]."""
        counts: npt.NDArray[np.int32] = self._num_owners[pages]
        return counts

    def free_pages(self) -> PageArray:
        """The free pages in the order they will be handed out, a copy."""
        return self._free_stack[: self._num_free][::-1].copy()

    def free_runs(self) -> FreeRuns:
        """Fragmentation of the free pages. Cost: a pass over all pages."""
        is_free = np.zeros(self.num_pages + 2, np.int8)
        is_free[1:-1] = self._num_owners == 0
        edges = np.flatnonzero(np.diff(is_free))
        lengths = edges[1::2] - edges[::2]
        return FreeRuns(int(lengths.size), int(lengths.max(initial=0)))

    def sort_free(self) -> None:
        """Hands out free pages in the order of their ids from now on. Cost: a sort of the free pages."""
        stack = self._free_stack[: self._num_free]
        stack.sort()
        stack[:] = stack[::-1].copy()

    def allocate(self, num_pages: int) -> PageArray:
        """Takes `num_pages` free pages, each with one owner. Raises: OutOfPagesError, and then takes none."""
        pages = self.try_allocate(num_pages)
        if pages is None:
            raise OutOfPagesError(num_pages, self._num_free, 0, pinned=self.num_pages - self._num_free)
        return pages

    def try_allocate(self, num_pages: int) -> PageArray | None:
        """Takes `num_pages` free pages, or None and no page when there are fewer."""
        check_int("num_pages", num_pages, minimum=0)
        if num_pages > self._num_free:
            return None
        rest = self._num_free - num_pages
        pages = self._free_stack[rest : self._num_free][::-1].copy()
        self._num_owners[pages] = 1
        self._num_free = rest
        return pages

    def retain(self, pages: PageIds) -> None:
        """Adds an owner to each page; none of them is free."""
        checked = self._checked_owned("pages", pages)
        self._num_owners[checked] += 1
        self._num_extra_owners += checked.shape[0]

    def release(self, pages: PageIds) -> PageArray:
        """Takes an owner from each page; returns those that became free, in the order given."""
        return self.release_distinct(self._checked_owned("pages", pages))

    def release_distinct(self, pages: PageArray) -> PageArray:
        """The same without a look for duplicates: `pages` are int32, in range and named once, by the caller's word.

        Raises: ValueError for a free page; nothing changed.
        """
        if pages.shape[0] <= 1:
            # Most closes release one page; array arithmetic would cost ten times as much.
            return self._release_one(pages) if pages.shape[0] else pages
        counts = self._num_owners[pages]
        if np.count_nonzero(counts) < counts.shape[0]:
            self._refuse_free("pages", pages, counts == 0)
        counts -= 1
        self._num_owners[pages] = counts
        if np.count_nonzero(counts):
            freed: PageArray = pages[counts == 0]
            self._num_extra_owners -= pages.shape[0] - freed.shape[0]
        else:
            freed = pages
        self._push(freed)
        return freed

    def _release_one(self, pages: PageArray) -> PageArray:
        page = pages.item(0)
        count = self._num_owners.item(page) - 1
        if count < 0:
            self._refuse_free("pages", pages, np.ones(1, np.bool_))
        self._num_owners[page] = count
        if count:
            self._num_extra_owners -= 1
            return pages[:0]
        self._push(pages)
        return pages

    def free(self, pages: PageIds) -> None:
        """Frees pages that have exactly one owner; a shared page is refused, as is a free one."""
        checked = self._checked_owned("pages", pages)
        shared = self._num_owners[checked] > 1
        if shared.any():
            page = int(checked[int(shared.argmax())])
            raise ValueError(
                f"pages must have one owner to be freed, got page {page} with {self._num_owners[page]}. "
                "Release it instead."
            )
        self.release_distinct(checked)

    def restore(self, owner_counts: npt.NDArray[np.int32]) -> None:
        """Makes the owners of every page what they are said to be, [num_pages], whatever they were before."""
        free = np.flatnonzero(owner_counts == 0).astype(np.int32)
        self._num_owners[:] = owner_counts
        self._free_stack[: free.shape[0]] = free[::-1]
        self._num_free = free.shape[0]
        self._num_extra_owners = int(np.maximum(owner_counts - 1, 0).sum())

    def _push(self, pages: PageArray) -> None:
        top = self._num_free + pages.shape[0]
        self._free_stack[self._num_free : top] = pages[::-1]
        self._num_free = top

    def _refuse_free(self, name: str, pages: PageArray, is_free: npt.NDArray[np.bool_]) -> None:
        page = int(pages[int(is_free.argmax())])
        raise ValueError(f"{name} must have an owner, got page {page}, which is free. It was freed before.")

    def _checked_owned(self, name: str, pages: PageIds) -> PageArray:
        checked = self._checked(name, pages)
        is_free = self._num_owners[checked] == 0
        if is_free.any():
            self._refuse_free(name, checked, is_free)
        if self._num_reserved and checked.size and checked.min() < self._num_reserved:
            raise ValueError(f"{name} must not be reserved (0..{self._num_reserved - 1}), got page {checked.min()}.")
        return checked

    def _checked(self, name: str, pages: PageIds) -> PageArray:
        """`pages` as int32, all in range and each named once."""
        array = pages if isinstance(pages, np.ndarray) else np.array(pages, dtype=None if len(pages) else np.int32)
        if array.ndim != 1:
            raise ValueError(f"{name} must have shape [n], got {list(array.shape)}.")
        if array.dtype.kind != "i":
            raise TypeError(f"{name} must be integers, got {array.dtype.name}.")
        if not array.size:
            return array.astype(np.int32)
        if array.min() < 0 or array.max() >= self.num_pages:
            wrong = int(array[int(((array < 0) | (array >= self.num_pages)).argmax())])
            raise ValueError(f"{name} must be in 0..{self.num_pages - 1}, got {wrong}.")
        # Each entry writes its position at its page; of two equal entries only the last finds its own again.
        positions = np.arange(array.shape[0], dtype=np.int32)
        self._order[array] = positions
        repeated = self._order[array] != positions
        if repeated.any():
            raise ValueError(f"{name} must name each page once, got page {array[int(repeated.argmax())]} twice.")
        return array.astype(np.int32, copy=False)
