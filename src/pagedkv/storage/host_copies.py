"""How the bytes of pages get between a pool and main memory: at once on the CPU, on a stream of their own on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from ..kernels.copy_pages import copy_pages

__all__ = ["DirectCopies", "HostCopies", "HostPages", "NoStream", "SideStream", "StagedCopies", "pages_of_gpu"]

# A copy to or from main memory takes bytes that lie together: pages are first gathered into so much of the device.
_STAGING_BYTES = 64 * 2**20
# Torch takes pinned memory in powers of two.
_SLAB_BYTES = 256 * 2**20


class HostCopies(Protocol):
    """What a store of pages copies with: ids of pages of the pool, and of its own in main memory, n of each."""

    def save(self, pages: torch.Tensor, held: Sequence[int]) -> None:
        """Copies page pages[i] of the pool over held[i]. Both are free to be changed from then on."""

    def load(self, held: Sequence[int], pages: torch.Tensor) -> None:
        """Copies held[i] over page pages[i] of the pool, for whatever uses the pool from then on."""

    def wait(self) -> None:
        """Returns when the bytes of all that was saved are in main memory."""


class DirectCopies:
    """Between tensors of the CPU, done when a call returns. Views [N, ...] of a pool, [M, ...] of the host's pages."""

    def __init__(self, pool_pages: Sequence[torch.Tensor], host_pages: Sequence[torch.Tensor]) -> None:
        self._pairs = list(zip(pool_pages, host_pages, strict=True))

    def save(self, pages: torch.Tensor, held: Sequence[int]) -> None:
        """See `HostCopies`."""
        ids = torch.tensor(held, dtype=torch.int64, device="cpu")
        for pool_pages, host_pages in self._pairs:
            copy_pages(pool_pages, host_pages, pages, ids)

    def load(self, held: Sequence[int], pages: torch.Tensor) -> None:
        """See `HostCopies`."""
        ids = torch.tensor(held, dtype=torch.int64, device="cpu")
        for pool_pages, host_pages in self._pairs:
            copy_pages(host_pages, pool_pages, ids, pages)

    def wait(self) -> None:
        """See `HostCopies`: there is nothing to wait for."""


class SideStream:
    """A stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def keep(self, tensor: torch.Tensor) -> None:
        """Has torch give the memory of `tensor` to nobody else while this stream may still use it."""
        tensor.record_stream(self._stream)

    @contextmanager
    def running(self) -> Iterator[Callable[[], None]]:
        """What is queued inside runs here, after all that the current stream was given before.

        Gives a function after whose call the current stream goes on, once what was queued here until then is over. If
        it was not called that happens at the end, also when an exception ends it.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        has_gone_on = False

        def go_on() -> None:
            nonlocal has_gone_on
            current.wait_event(self._stream.record_event())
            has_gone_on = True

        try:
            with torch.cuda.stream(self._stream):
                yield go_on
        finally:
            if not has_gone_on:
                go_on()

    def wait(self) -> None:
        """Returns when all that was queued is over."""
        self._stream.synchronize()


class NoStream:
    """In its place where all is done in order anyway."""

    def keep(self, tensor: torch.Tensor) -> None:
        """Nothing."""

    def running(self) -> AbstractContextManager[Callable[[], None]]:
        """Runs what is inside."""
        return nullcontext(lambda: None)

    def wait(self) -> None:
        """Nothing."""


class HostPages:
    """Memory for `num_pages` pages of `shape` bytes each, pinned or not, in several tensors [n, *shape]."""

    def __init__(self, num_pages: int, shape: Sequence[int], *, is_pinned: bool, slab_bytes: int = _SLAB_BYTES) -> None:
        num_bytes = max(torch.Size(shape).numel(), 1)
        self.pages_a_slab = max(slab_bytes // num_bytes, 1)
        with torch.inference_mode(False):
            self._slabs = [
                torch.empty(
                    (min(self.pages_a_slab, num_pages - first), *shape),
                    dtype=torch.uint8,
                    device="cpu",
                    pin_memory=is_pinned,
                )
                for first in range(0, num_pages, self.pages_a_slab)
            ]

    def runs(self, held: Sequence[int]) -> Iterator[tuple[slice, torch.Tensor]]:
        """`held` in parts that lie together: which of its entries, and their bytes."""
        start = 0
        for stop in range(1, len(held) + 1):
            if stop == len(held) or held[stop] != held[stop - 1] + 1 or held[stop] % self.pages_a_slab == 0:
                slab, first = divmod(held[start], self.pages_a_slab)
                yield slice(start, stop), self._slabs[slab][first : first + stop - start]
                start = stop


class StagedCopies:
    """Between a GPU and pinned memory, on a side stream: calls queue the copies and return.

    What the current stream is given after a save may overwrite the saved pages: it waits until they were read. What it
    is given after a load finds the pages loaded. Loads wait for saves, since both are on the one side stream.
    """

    def __init__(
        self,
        pool_pages: Sequence[torch.Tensor],
        host_pages: Sequence[HostPages],
        stream: SideStream | NoStream,
        staging_bytes: int = _STAGING_BYTES,
    ) -> None:
        self._pairs = list(zip(pool_pages, host_pages, strict=True))
        self._stream = stream
        self._staging_bytes = staging_bytes
        for pages in pool_pages:
            stream.keep(pages)

    def save(self, pages: torch.Tensor, held: Sequence[int]) -> None:
        """See `HostCopies`."""
        with self._stream.running() as go_on:
            for view, ids, part, host, is_last in self._parts(pages, held):
                staged = torch.empty((ids.shape[0], *view.shape[1:]), dtype=view.dtype, device=view.device)
                copy_pages(view, staged, ids, torch.arange(ids.shape[0], device=view.device))
                if is_last:
                    go_on()
                for entries, waiting in host.runs(held[part]):
                    waiting.copy_(staged[entries], non_blocking=True)

    def load(self, held: Sequence[int], pages: torch.Tensor) -> None:
        """See `HostCopies`."""
        with self._stream.running():
            for view, ids, part, host, _ in self._parts(pages, held):
                staged = torch.empty((ids.shape[0], *view.shape[1:]), dtype=view.dtype, device=view.device)
                for entries, waiting in host.runs(held[part]):
                    staged[entries].copy_(waiting, non_blocking=True)
                copy_pages(staged, view, torch.arange(ids.shape[0], device=view.device), ids)

    def wait(self) -> None:
        """See `HostCopies`."""
        self._stream.wait()

    def _parts(
        self, pages: torch.Tensor, held: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice, HostPages, bool]]:
        """As many pages at a time as staging has room for: views of the pool, ids, which of all, and the host's."""
        if not held:
            return
        device = self._pairs[0][0].device
        if pages.device == device:
            self._stream.keep(pages)
        else:
            pages = pages.pin_memory().to(device, non_blocking=True)
        for number, (view, host) in enumerate(self._pairs, start=1):
            step = max(self._staging_bytes // max(view[0].numel(), 1), 1)
            for start in range(0, len(held), step):
                part = slice(start, min(start + step, len(held)))
                is_last = number == len(self._pairs) and part.stop == len(held)
                yield view, pages[part], part, host, is_last


def pages_of_gpu(pool_pages: Sequence[torch.Tensor], num_pages: int) -> StagedCopies:
    """Copies between the views [N, ...] of a pool on a GPU and `num_pages` new pages of pinned memory."""
    host_pages = [HostPages(num_pages, view.shape[1:], is_pinned=True) for view in pool_pages]
    return StagedCopies(pool_pages, host_pages, SideStream(pool_pages[0].device))
