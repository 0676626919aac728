"""Writes new keys and values into their slots."""

from __future__ import annotations

import torch

from ..shapes import Shapes, check_device, check_dtype, check_last_dim_contiguous
from .backend import OpCall, select
from .pages import between_graphs, check_kv_pages, check_no_grad, check_writable, fits_graph, to_nhd

__all__ = ["store_kv"]


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    layout: str = "NHD",
    backend: str = "auto",
) -> None:
    """Writes new keys and values into their slots, in place.

    Shapes: key [T, Hk, D]; value [T, Hk, Dv]; slot_mapping [T] int64;
            key_pages [N, P, Hk, D]; value_pages [N, P, Hk, Dv] ("HND": [N, Hk, P, D] and [N, Hk, P, Dv]).
            The dtype is that of the pages. Last dims are contiguous, other strides are free.
    Slots:  slot = page * P + offset. A negative slot is skipped. Duplicates: the last one wins.
    When:   after the pages are reserved, before the attention of the same step.
    Owns:   writes only the named slots; every other byte is unchanged. Nothing is written if the call raises.
            key and value may lie in the pages: they count as they were before the call.
    Raises: ValueError, TypeError for a shape, dtype, device or slot that breaks the lines above, for expanded pages,
            and for a tensor that requires a gradient while gradients are recorded.
    Source: PagedAttention (arXiv 2309.06180), section 4.3. Reference: kernels/reference/store_kv.py.

    >>> key_pages, value_pages = torch.zeros(2, 4, 16, 8, 64)
    >>> store_kv(torch.ones(3, 8, 64), torch.ones(3, 8, 64), key_pages, value_pages, torch.tensor([0, 1, 16]))
    >>> key_pages.sum(dim=(1, 2, 3)).tolist()
    [1024.0, 512.0, 0.0, 0.0]
    """
    check_no_grad(key=key, value=value, key_pages=key_pages, value_pages=value_pages)
    if not torch.compiler.is_compiling():
        _store_kv(key, value, key_pages, value_pages, slot_mapping, layout, backend)
    elif fits_graph(key_pages, value_pages):
        _store_kv_op(key, value, key_pages, value_pages, slot_mapping, layout, backend)
    else:
        _store_kv_between_graphs(key, value, key_pages, value_pages, slot_mapping, layout, backend)


def _store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: str,
    backend: str,
) -> None:
    key_pages, value_pages = to_nhd(key_pages, value_pages, layout)
    shapes = Shapes()
    check_kv_pages(shapes, key_pages, value_pages, layout)
    shapes.check("key", key, "T Hk D")
    shapes.check("value", value, "T Hk Dv")
    shapes.check("slot_mapping", slot_mapping, "T")
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    check_dtype("key", key, key_pages.dtype)
    check_dtype("value", value, value_pages.dtype)
    check_last_dim_contiguous("key", key)
    check_last_dim_contiguous("value", value)
    check_writable("key_pages", key_pages)
    check_writable("value_pages", value_pages)
    for name, tensor in (("key", key), ("value", value), ("slot_mapping", slot_mapping)):
        check_device(name, tensor, key_pages.device, "key_pages")
    call = OpCall("store_kv", key_pages.device.type, (key_pages.dtype, value_pages.dtype))
    select(call, backend)(key, value, key_pages, value_pages, slot_mapping)


_store_kv_op = torch.library.custom_op("pagedkv::store_kv", _store_kv, mutates_args=("key_pages", "value_pages"))
_store_kv_between_graphs = between_graphs(_store_kv)
