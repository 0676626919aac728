"""Reads keys and values out of their slots."""

from __future__ import annotations

import torch

from ..shapes import Shapes, check_device, check_dtype
from .backend import OpCall, select
from .pages import check_kv_pages, check_no_grad, to_nhd

__all__ = ["gather_kv"]


def gather_kv(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    layout: str = "NHD",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies the keys and values of the named slots out of the pages: the inverse of store_kv.

    Shapes: key_pages [N, P, Hk, D]; value_pages [N, P, Hk, Dv] ("HND": [N, Hk, P, D]); slots [T] int64.
            Returns key [T, Hk, D] and value [T, Hk, Dv], contiguous, in the dtype of the pages: those of int8 and
            float8 pages are the codes, bit for bit. Their scales [N, Hk, P] are read as pages of one element a head,
            `gather_kv(key_scales[..., None], value_scales[..., None], slots, layout="HND")`.
    Slots:  slot = page * P + offset. A negative slot gives a row of zeros. Slots may repeat.
    Raises: ValueError, TypeError for a shape, dtype, device or slot that breaks the lines above, and for pages that
            require a gradient while gradients are recorded.
    Reference: kernels/reference/gather_kv.py.
    """
    check_no_grad(key_pages=key_pages, value_pages=value_pages)
    op = _gather_kv_op if torch.compiler.is_compiling() else _gather_kv
    key, value = op(key_pages, value_pages, slots, layout, backend)
    return key, value


def _gather_kv(
    key_pages: torch.Tensor, value_pages: torch.Tensor, slots: torch.Tensor, layout: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    key_pages, value_pages = to_nhd(key_pages, value_pages, layout)
    shapes = Shapes()
    check_kv_pages(shapes, key_pages, value_pages, layout, quantised=True)
    shapes.check("slots", slots, "T")
    check_dtype("slots", slots, torch.int64)
    check_device("slots", slots, key_pages.device, "key_pages")
    call = OpCall("gather_kv", key_pages.device.type, (key_pages.dtype, value_pages.dtype))
    key = key_pages.new_empty(shapes["T"], shapes["Hk"], shapes["D"])
    value = value_pages.new_empty(shapes["T"], shapes["Hk"], shapes["Dv"])
    select(call, backend)(key_pages, value_pages, slots, key, value)
    return key, value


_gather_kv_op = torch.library.custom_op("pagedkv::gather_kv", _gather_kv, mutates_args=())


@_gather_kv_op.register_fake
def _gather_kv_shape(
    key_pages: torch.Tensor, value_pages: torch.Tensor, slots: torch.Tensor, layout: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = 2 if layout == "NHD" else 1
    key, value = (
        pages.new_empty(slots.shape[0], pages.shape[heads], pages.shape[3]) for pages in (key_pages, value_pages)
    )
    return key, value
