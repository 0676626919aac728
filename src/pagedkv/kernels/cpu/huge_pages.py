"""Large memory pages under a pool (csrc/advise_huge_pages.cpp)."""

from __future__ import annotations

import torch

from .native import core, unavailable

__all__ = ["advise_huge_pages"]

# A large page is 2 MiB; smaller buffers would hold none, and a small pool should not load the core.
_LEAST_BYTES = 8 << 20


def advise_huge_pages(buffer: torch.Tensor) -> None:
    """Asks for large pages under a CPU buffer that nothing was written to yet; where there are none, does nothing."""
    if buffer.device.type == "cpu" and buffer.numel() * buffer.element_size() >= _LEAST_BYTES and unavailable() is None:
        core().advise_huge_pages(buffer)
