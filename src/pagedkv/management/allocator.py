"""Which pages are free, and how many owners each of the others has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OutOfPagesError
from ..shapes import check_int

__all__ = ["PageAllocator", "PageArray", "PageIds"]

PageArray = npt.NDArray[np.int32]
PageIds = Sequence[int] | npt.NDArray[np.integer[Any]]


class PageAllocator:
    """Hands out the pages 0..num_pages-1 and counts their owners; a page without owners is free.

    Owns:   the counts. Pages come from a stack whose order keeps runs together: a fresh pool gives 0, 1, 2, ..., and
            pages given back together come out again together and in the same order.
    Cost:   constant a page.
    Raises: ValueError, TypeError for pages that are out of range, named twice in one call or free; nothing changed.

    >>> allocator = PageAllocator(4)
    >>> pages = allocator.allocate(3)
    >>> pages.tolist(), allocator.num_free
    ([0, 1, 2], 1)
    >>> allocator.retain(pages[:1])
    >>> allocator.release(pages).tolist(), allocator.num_free
    ([1, 2], 3)
    """

    def __init__(self, num_pages: int) -> None:
        check_int("num_pages", num_pages, minimum=1)
        if num_pages > 2**31 - 1:
            raise ValueError(f"num_pages must be below 2**31 (page ids are int32), got {num_pages}.")
        self._num_owners = np.zeros(num_pages, np.int32)
        # The top of the stack is at num_free - 1, so it is filled with the last page first.
        self._free_stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._num_free = num_pages
        # Written before it is read in each check for duplicates; its content between calls means nothing.
        self._order = np.zeros(num_pages, np.int32)

    @property
    def num_pages(self) -> int:
        """All pages, free or not."""
        return self._num_owners.shape[0]

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return self._num_free

    def num_owners(self, page: int) -> int:
        """Owners of one page, 0 when it is free."""
        return int(self._num_owners[self._checked("page", [page])[0]])

    def owner_counts(self) -> npt.NDArray[np.int32]:
        """Owners of every page, a copy [num_pages]."""
        return self._num_owners.copy()

    def owner_counts_of(self, pages: PageArray) -> npt.NDArray[np.int32]:
        """Owners of some pages, a copy [n]."""
        counts: npt.NDArray[np.int32] = self._num_owners[pages]
        return counts

    def free_pages(self) -> PageArray:
        """The free pages in the order they will be handed out, a copy."""
        return self._free_stack[: self._num_free][::-1].copy()

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
        self._num_owners[self._checked_owned("pages", pages)] += 1

    def release(self, pages: PageIds) -> PageArray:
        """Takes an owner from each page; returns those that became free, in the order given."""
        checked = self._checked_owned("pages", pages)
        self._num_owners[checked] -= 1
        freed: PageArray = checked[self._num_owners[checked] == 0]
        self._push(freed)
        return freed

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
        self._num_owners[checked] = 0
        self._push(checked)

    def _push(self, pages: PageArray) -> None:
        top = self._num_free + pages.shape[0]
        self._free_stack[self._num_free : top] = pages[::-1]
        self._num_free = top

    def _checked_owned(self, name: str, pages: PageIds) -> PageArray:
        checked = self._checked(name, pages)
        free = self._num_owners[checked] == 0
        if free.any():
            page = int(checked[int(free.argmax())])
            raise ValueError(f"{name} must have an owner, got page {page}, which is free. It was freed before.")
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
