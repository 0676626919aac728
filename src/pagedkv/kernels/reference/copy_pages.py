"""copy_pages in plain torch: the specification."""

from __future__ import annotations

import torch

from ..pages import check_ids, check_order

__all__ = ["copy_pages"]


def copy_pages(src_pages: torch.Tensor, dst_pages: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """The page axis is the first; everything but the ids is checked."""
    check_ids("src", src, src_pages.shape[0], "src_pages")
    check_ids("dst", dst, dst_pages.shape[0], "dst_pages")
    one_address = src_pages.numel() > 0 and src_pages.data_ptr() == dst_pages.data_ptr()
    one_tensor = one_address and src_pages.stride() == dst_pages.stride()
    check_order(src, dst, one_tensor)
    # The right side is a copy, so views of one buffer that share bytes are read before anything is written.
    dst_pages[dst] = src_pages[src]
