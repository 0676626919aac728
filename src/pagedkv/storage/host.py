"""Pages of a pool that wait in main memory, bit for bit."""

from __future__ import annotations

import torch

from ..errors import TierError
from ..kernels.copy_pages import copy_pages
from ..shapes import check_device, check_dtype, check_int
from .hybrid_pool import HybridKVPool
from .mla_pool import MLAPool
from .pool import KVPool

__all__ = ["HostPageStore"]

_Pool = KVPool | HybridKVPool | MLAPool


class HostPageStore:
    """Room for `num_pages` pages of a pool in main memory: where the pages of preempted sequences wait.

    Owns:   a pool of the same kind on the CPU. A ticket is good until it is dropped. Of a HybridKVPool it may be for
            pages of any groups.
    Cost:   one copy of the bytes, of all layers at once where the pool's order allows. Copies are done when a call
            returns.
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
        held = _pool_like(pool, num_pages)
        self._pairs = list(zip(_pages_as_bytes(pool), _pages_as_bytes(held), strict=True))
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._saved: dict[int, torch.Tensor] = {}
        self._num_tickets = 0

    @property
    def num_free_pages(self) -> int:
        """Pages there is room for."""
        return len(self._free)

    def save(self, pages: torch.Tensor) -> int:
        """Copies the bytes of pages [n] int64 and returns the ticket of the copy."""
        self._check(pages, minimum=0)
        num_pages = pages.shape[0]
        if num_pages > len(self._free):
            raise TierError(
                f"the host store must have room for {num_pages} pages, got {len(self._free)} free of {self.num_pages}. "
                "Drop the sequence and compute it again."
            )
        held = torch.tensor(self._free[len(self._free) - num_pages :], dtype=torch.int64)
        for device_pages, host_pages in self._pairs:
            _copy(device_pages, host_pages, pages, held)
        del self._free[len(self._free) - num_pages :]
        self._num_tickets += 1
        self._saved[self._num_tickets] = held
        return self._num_tickets

    def load(self, ticket: int, pages: torch.Tensor) -> None:
        """Writes the i-th page saved under `ticket` over pages[i], none for -1. The copy stays."""
        held = self._held(ticket)
        self._check(pages, minimum=-1)
        if pages.shape != held.shape:
            raise ValueError(f"pages must have shape {list(held.shape)} (as saved), got {list(pages.shape)}.")
        is_wanted = pages.cpu() >= 0
        wanted = pages[is_wanted.to(pages.device)]
        if len(set(wanted.tolist())) != wanted.shape[0]:
            raise ValueError("pages must name each page once, got one twice.")
        for device_pages, host_pages in self._pairs:
            _copy(host_pages, device_pages, held[is_wanted], wanted)

    def drop(self, ticket: int) -> None:
        """Forgets the copy."""
        held = self._held(ticket)
        del self._saved[ticket]
        self._free.extend(held.tolist())

    def _held(self, ticket: int) -> torch.Tensor:
        held = self._saved.get(ticket)
        if held is None:
            raise ValueError(f"ticket must be one that was not dropped, got {ticket}.")
        return held

    def _check(self, pages: torch.Tensor, minimum: int) -> None:
        check_dtype("pages", pages, torch.int64)
        check_device("pages", pages, self._pool.device, "the pool")
        if pages.dim() != 1:
            raise ValueError(f"pages must have shape [n], got {list(pages.shape)}.")
        if pages.numel() and (int(pages.min()) < minimum or int(pages.max()) >= self._pool.num_pages):
            found = f"{int(pages.min())}..{int(pages.max())}"
            raise ValueError(f"pages must be in {minimum}..{self._pool.num_pages - 1}, got {found}.")


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


def _copy(src_pages: torch.Tensor, dst_pages: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    if src_pages.device == dst_pages.device:
        copy_pages(src_pages, dst_pages, src, dst)
    else:
        moved = src_pages.index_select(0, src.to(src_pages.device)).to(dst_pages.device)
        dst_pages.index_copy_(0, dst.to(dst_pages.device), moved)
