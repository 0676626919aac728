"""copy_pages on the native core (csrc/copy_pages.cpp)."""

from __future__ import annotations

import torch

from ..pages import mark_written
from .native import core

__all__ = ["copy_pages"]


def copy_pages(src_pages: torch.Tensor, dst_pages: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """The page axis is the first; the core checks the ids before it writes."""
    core().copy_pages(src_pages, dst_pages, src, dst, torch.get_num_threads())
    mark_written(dst_pages)
