"""The memory of a pool."""

from __future__ import annotations

import torch

from ..kernels.cpu.huge_pages import advise_huge_pages

__all__ = ["page_buffer"]


def page_buffer(num_elements: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A new uninitialised buffer, on large memory pages where the system gives them."""
    # Outside inference mode, so that the pool can be written both inside and outside of it later.
    with torch.inference_mode(False):
        buffer = torch.empty(num_elements, dtype=dtype, device=device)
    advise_huge_pages(buffer)
    return buffer
