"""Pages of a pool that wait in main memory, bit for bit."""

from __future__ import annotations

import torch

from ..errors import TierError
from ..shapes import check_device, check_dtype, check_int
from .host_copies import DirectCopies, HostCopies, pages_of_gpu
from .hybrid_pool import HybridKVPool
from .mla_pool import MLAPool
from .pool import KVPool

__all__ = ["HostPageStore"]

_Pool = KVPool | HybridKVPool | MLAPool


class HostPageStore:
    """Room for `num_pages` pages of a pool in main memory: where the pages of preempted sequences wait.

    Owns:   a pool of the same kind on the CPU, or for one on a GPU pinned memory of that size. A ticket is good until
            it is dropped. Of a HybridKVPool it may be for pages of any groups.
    Cost:   one copy of the bytes, of all layers at once where the pool's order allows. Copies of a pool on the CPU are
            done when a call returns. Those of one on a GPU run on a stream of their own; what the current stream is
            given later waits until saved pages were read and loaded ones written. Ids of pages may be on the CPU then,
            which saves reading them back.
    Raises: TierError when there is no room, and nothing is kept of the call; ValueError, TypeError for wrong pages.

    >>> pool = KVPool(KVCacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32), num_pages=4)
    >>> store = HostPageStore(pool, num_pages=2)
    >>> ticket = store.save(torch.tensor([3, 1]))
    >>> store.load(ticket, torch.tensor([0, -1]))
    >>> store.drop(ticket)
    """

    def __init__(self, pool: _Pool, num_pages: int) -> None:
        check_int("num_pages", num_pages, minimum=1)
        if not isinstance(pool, _Pool):
            raise TypeError(f"pool must be a KVPool, a HybridKVPool or an MLAPool, got {type(pool).__name__}.")
        self._pool = pool
        self._copies = _copies(pool, num_pages)
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._saved: dict[int, list[int]] = {}
        self._num_tickets = 0

    @property
    def num_free_pages(self) -> int:
        """Pages there is room for."""
        return len(self._free)

    def save(self, pages: torch.Tensor) -> int:
        """Copies the bytes of pages [n] int64 and returns the ticket of the copy."""
        self._checked(pages, minimum=0)
        num_pages = pages.shape[0]
        if num_pages > len(self._free):
            raise TierError(
                f"the host store must have room for {num_pages} pages, got {len(self._free)} free of {self.num_pages}. "
                "Drop the sequence and compute it again."
            )
        # In order: what lies together is copied together.
        held = sorted(self._free[len(self._free) - num_pages :])
        self._copies.save(pages, held)
        del self._free[len(self._free) - num_pages :]
        self._num_tickets += 1
        self._saved[self._num_tickets] = held
        return self._num_tickets

    def load(self, ticket: int, pages: torch.Tensor) -> None:
        """Writes the i-th page saved under `ticket` over pages[i], none for -1. The copy stays."""
        held = self._held(ticket)
        ids = self._checked(pages, minimum=-1)
        if len(ids) != len(held):
            raise ValueError(f"pages must have shape [{len(held)}] (as saved), got {list(pages.shape)}.")
        wanted = [page for page in ids if page >= 0]
        if len(set(wanted)) != len(wanted):
            raise ValueError("pages must name each page once, got one twice.")
        kept = [page for page, target in zip(held, ids, strict=True) if target >= 0]
        self._copies.load(
            kept, pages if len(kept) == len(held) else torch.tensor(wanted, dtype=torch.int64, device="cpu")
        )

    def wait(self) -> None:
        """Returns when the bytes of all that was saved are in main memory."""
        self._copies.wait()

    def drop(self, ticket: int) -> None:
        """Forgets the copy."""
        held = self._held(ticket)
        del self._saved[ticket]
        self._free.extend(held)

    def _held(self, ticket: int) -> list[int]:
        held = self._saved.get(ticket)
        if held is None:
            raise ValueError(f"ticket must be one that was not dropped, got {ticket}.")
        return held

    def _checked(self, pages: torch.Tensor, minimum: int) -> list[int]:
        """The ids, in main memory."""
        check_dtype("pages", pages, torch.int64)
        if not pages.is_cpu:
            check_device("pages", pages, self._pool.device, "the pool")
        if pages.dim() != 1:
            raise ValueError(f"pages must have shape [n], got {list(pages.shape)}.")
        ids: list[int] = pages.tolist()
        if ids and (min(ids) < minimum or max(ids) >= self._pool.num_pages):
            found = f"{min(ids)}..{max(ids)}"
            raise ValueError(f"pages must be in {minimum}..{self._pool.num_pages - 1}, got {found}.")
        return ids


def _copies(pool: _Pool, num_pages: int) -> HostCopies:
    pool_pages = _pages_as_bytes(pool)
    if pool.device.type == "cuda":
        return pages_of_gpu(pool_pages, num_pages)
    return DirectCopies(pool_pages, _pages_as_bytes(_pool_like(pool, num_pages)))


def _pool_like(pool: _Pool, num_pages: int) -> _Pool:
    """A pool of `num_pages` pages of the same kind on the CPU."""
    if isinstance(pool, HybridKVPool):
        return HybridKVPool(pool.spec, pool.groups, num_pages)
    return KVPool(pool.spec, num_pages) if isinstance(pool, KVPool) else MLAPool(pool.spec, num_pages)


def _pages_as_bytes(pool: _Pool) -> list[torch.Tensor]:
    """All bytes of a pool in views [N, ..., bytes] whose first axis is the page."""
    if pool.spec.order == "page_first":
        views = [pool.buffer.view(pool.num_pages, -1)]
    elif isinstance(pool, KVPool):
        views = pool._pages_by_axis()
    else:
        views = [pool.buffer.view(pool.spec.num_layers, pool.num_pages, -1).movedim(1, 0)]
    return [view.view(torch.uint8) for view in views]
