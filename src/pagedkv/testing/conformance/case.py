"""One case: a public op in one situation, on tensors that are the same at every run and poisoned where nobody wrote."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..poison import poisoned_memory

__all__ = ["Check", "ConformanceCase"]

# Gets the name of a back end and the device of its tensors; raises what is wrong.
Check = Callable[[str, torch.device], None]


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
def _same_world(name: str, device: torch.device) -> Iterator[None]:
    """Random numbers by the name of the case, poison in new memory, and both as they were afterwards."""
    with torch.random.fork_rng(devices=[]), poisoned_memory(), warnings.catch_warnings():
        torch.manual_seed(zlib.crc32(name.encode()))
        if device.type != "cpu":
            # What poisons memory also refuses ops of accelerators that are not deterministic; no case asks for that.
            torch.use_deterministic_algorithms(True, warn_only=True)
            warnings.simplefilter("ignore")
        yield
