"""One case: a public op in one situation, on tensors that are the same at every run and poisoned where nobody wrote."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ..poison import poisoned_memory

__all__ = ["Check", "ConformanceCase", "threads_of_caller"]

# Gets the name of a back end and the device of its tensors; raises what is wrong.
Check = Callable[[str, torch.device], None]


_NUM_THREADS: ContextVar[int] = ContextVar("num_threads")


@dataclass(frozen=True, eq=False)
class ConformanceCase:
    """An op, a situation, and the check of it.

    Raises: when called, AssertionError for a wrong result, BackendUnavailableError for a call that the back end does
            not offer, and whatever the back end raises.
    """

    op: str
    situation: str
    check: Check

    def __str__(self) -> str:
        return f"{self.op}-{self.situation}"

    def __call__(self, backend: str, device: str | torch.device = "cpu") -> None:
        """Runs the case on the named back end."""
        with _same_world(str(self), torch.device(device)):
            self.check(backend, torch.device(device))


@contextmanager
def threads_of_caller() -> Iterator[None]:
    """Within a case: as many threads as whoever runs it has, for what belongs to the back end.

    What is expected is computed on one, for its tensors are small: threads that wait for each other would take most of
    the time on a machine that does other work.
    """
    torch.set_num_threads(_NUM_THREADS.get())
    try:
        yield
    finally:
        torch.set_num_threads(1)


@contextmanager
def _same_world(name: str, device: torch.device) -> Iterator[None]:
    """Random numbers by the name of the case, poison in new memory, one thread, and all as it was afterwards."""
    num_threads = _NUM_THREADS.set(torch.get_num_threads())
    with torch.random.fork_rng(devices=[]), poisoned_memory(), warnings.catch_warnings():
        torch.manual_seed(zlib.crc32(name.encode()))
        if device.type != "cpu":
            # What poisons memory also refuses ops of accelerators that are not deterministic; no case asks for that.
            torch.use_deterministic_algorithms(True, warn_only=True)
            warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(_NUM_THREADS.get())
            _NUM_THREADS.reset(num_threads)
