"""Copies whole pages, within one pool or between two."""

from __future__ import annotations

import torch

from ..shapes import Shapes, check_device, check_dtype
from .backend import OpCall, select
from .pages import between_graphs, check_no_grad, check_writable, fits_graph

__all__ = ["copy_pages"]


def copy_pages(
    src_pages: torch.Tensor,
    dst_pages: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Copies page src[i] of `src_pages` over page dst[i] of `dst_pages`, bitwise.

    Shapes: src_pages [N, ...]; dst_pages [M, ...] with the same trailing shape and dtype, any strides; the page axis is
            the first, so a pool of all layers passes a view with that axis moved to the front. src, dst [n] int64.
    Order:  the copies happen as if all at once: no page is named twice in dst, and no page of dst is also in src when
            both are one tensor. Different views that share bytes are allowed: all is read before anything is written.
    Owns:   writes only the pages in dst. Nothing is written if the call raises.
    Raises: ValueError, TypeError for a shape, dtype, device, page id or order that breaks the lines above, for an
            expanded dst_pages, and for a tensor that requires a gradient while gradients are recorded.
    Reference: kernels/reference/copy_pages.py.
    """
    check_no_grad(src_pages=src_pages, dst_pages=dst_pages)
    if not torch.compiler.is_compiling():
        _copy_pages(src_pages, dst_pages, src, dst, backend)
    elif not fits_graph(src_pages, dst_pages):
        _copy_pages_between_graphs(src_pages, dst_pages, src, dst, backend)
    elif src_pages is dst_pages:
        _copy_pages_within_op(dst_pages, src, dst, backend)
    else:
        _copy_pages_op(src_pages, dst_pages, src, dst, backend)


def _copy_pages(
    src_pages: torch.Tensor, dst_pages: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, backend: str
) -> None:
    shapes = Shapes()
    shapes.check("src", src, "n")
    shapes.check("dst", dst, "n")
    for name, tensor, owner in (("src_pages", src_pages, None), ("dst_pages", dst_pages, src_pages)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        if tensor.dim() < 1 or (owner is not None and tensor.shape[1:] != owner.shape[1:]):
            wanted = "[N, ...]" if owner is None else f"[M, *{list(owner.shape[1:])}] (as src_pages)"
            raise ValueError(f"{name} must have shape {wanted}, got {list(tensor.shape)}.")
    check_dtype("dst_pages", dst_pages, src_pages.dtype)
    for name, tensor in (("dst_pages", dst_pages), ("src", src), ("dst", dst)):
        check_device(name, tensor, src_pages.device, "src_pages")
    for name, tensor in (("src", src), ("dst", dst)):
        check_dtype(name, tensor, torch.int64)
    check_writable("dst_pages", dst_pages)
    call = OpCall("copy_pages", src_pages.device.type, (src_pages.dtype,))
    select(call, backend)(src_pages, dst_pages, src, dst)


def _copy_pages_within(pages: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, backend: str) -> None:
    _copy_pages(pages, pages, src, dst, backend)


_copy_pages_op = torch.library.custom_op("pagedkv::copy_pages", _copy_pages, mutates_args=("dst_pages",))
# A tensor that an op writes may not be a second argument of it, so copies within one tensor are an op of their own.
_copy_pages_within_op = torch.library.custom_op(
    "pagedkv::copy_pages_within", _copy_pages_within, mutates_args=("pages",)
)
_copy_pages_between_graphs = between_graphs(_copy_pages)
