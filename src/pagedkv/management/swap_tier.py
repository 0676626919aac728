"""Where the pages of sequences wait that are not on pages of the pool."""

from __future__ import annotations

from typing import Any, Protocol

import torch

__all__ = ["SwapTier"]


class SwapTier(Protocol):
    """Where the bytes of pages wait; `HostPageStore` (storage/host.py) is one.

    Ids of pages are on the CPU, wherever the pages are.
    """

    def save(self, pages: torch.Tensor) -> Any:
        """Copies the bytes of pages [n] int64 and returns what names the copy. When it raises, nothing is kept."""

    def load(self, ticket: Any, pages: torch.Tensor) -> None:
        """Writes the i-th page saved under `ticket` over pages[i], none for -1. The copy stays."""

    def drop(self, ticket: Any) -> None:
        """Forgets the copy."""
