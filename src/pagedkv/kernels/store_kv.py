"""Writes new keys and values into their slots."""

from __future__ import annotations

import torch

from ..shapes import Shapes, check_device, check_dtype, check_last_dim_contiguous, dtype_name
from ..spec import CACHE_DTYPES, SCALED_DTYPES
from .backend import OpCall, select
from .pages import between_graphs, check_kv_pages, check_no_grad, check_writable, fits_graph, to_nhd

__all__ = ["check_store", "store_kv"]

_SCALES = frozenset({"scales"})


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    layout: str = "NHD",
    backend: str = "auto",
) -> None:
    """Writes new keys and values into their slots, in place.

    Shapes: key [T, Hk, D]; value [T, Hk, Dv]; slot_mapping [T] int64;
            key_pages [N, P, Hk, D]; value_pages [N, P, Hk, Dv] ("HND": [N, Hk, P, D] and [N, Hk, P, Dv]).
            The dtype is that of the pages, which may be int8 or float8 too: without scales every bit is moved as it is.
            Last dims are contiguous, other strides are free.
    Scales: with key_scales and value_scales [N, Hk, P] float32, of any strides, whatever the layout, the pages are int8
            or float8_e4m3fn, key and value float32, float16 or bfloat16, and each token and head is quantised by the
            rule of `quantize_kv`: its codes go to the pages, its scale to the scales.
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
    check_no_grad(
        key=key,
        value=value,
        key_pages=key_pages,
        value_pages=value_pages,
        key_scales=key_scales,
        value_scales=value_scales,
    )
    arguments = key, value, key_pages, value_pages, slot_mapping, layout, backend, key_scales, value_scales
    if not torch.compiler.is_compiling():
        _store_kv(*arguments)
    elif fits_graph(*(t for t in (key_pages, value_pages, key_scales, value_scales) if t is not None)):
        _store_kv_op(*arguments)
    else:
        _store_kv_between_graphs(*arguments)


def _store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: str,
    backend: str,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    key_pages, value_pages = to_nhd(key_pages, value_pages, layout)
    check_store(Shapes(), key, value, key_pages, value_pages, slot_mapping, layout, key_scales, value_scales)
    if key_scales is not None:
        dtypes = (key.dtype, value.dtype, key_pages.dtype)
        call = OpCall("store_kv", key_pages.device.type, dtypes, features=_SCALES)
    else:
        call = OpCall("store_kv", key_pages.device.type, (key_pages.dtype, value_pages.dtype))
    select(call, backend)(key, value, key_pages, value_pages, slot_mapping, key_scales, value_scales)


def check_store(
    shapes: Shapes,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: str,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    """Refuses what `store_kv` does not take, but for the slots; pages in NHD order, `layout` for the words alone."""
    check_kv_pages(shapes, key_pages, value_pages, layout, quantised=True)
    shapes.check("key", key, "T Hk D")
    shapes.check("value", value, "T Hk Dv")
    shapes.check("slot_mapping", slot_mapping, "T")
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    has_scales = key_scales is not None or value_scales is not None
    if has_scales:
        _check_scales(shapes, key_pages, key_scales, value_scales)
    for name, tensor in (("key", key), ("value", value)):
        if has_scales or tensor.dtype != key_pages.dtype:
            _check_dtype_of_tokens(name, tensor, key_pages.dtype, has_scales)
        check_last_dim_contiguous(name, tensor)
    check_writable("key_pages", key_pages)
    check_writable("value_pages", value_pages)
    for name, tensor in (("key", key), ("value", value), ("slot_mapping", slot_mapping)):
        check_device(name, tensor, key_pages.device, "key_pages")


def _check_dtype_of_tokens(name: str, tokens: torch.Tensor, of_pages: torch.dtype, has_scales: bool) -> None:
    if has_scales:
        remedy = "Without scales it is moved as it is." if tokens.dtype == of_pages else ""
        check_dtype(name, tokens, *CACHE_DTYPES, remedy=remedy)
    else:
        can_quantise = of_pages in SCALED_DTYPES
        remedy = "Pass key_scales and value_scales to quantise on the way in." if can_quantise else ""
        check_dtype(name, tokens, of_pages, remedy=remedy)


def _check_scales(
    shapes: Shapes, key_pages: torch.Tensor, key_scales: torch.Tensor | None, value_scales: torch.Tensor | None
) -> None:
    dtype = key_pages.dtype
    if dtype not in SCALED_DTYPES:
        raise ValueError(f"key_scales and value_scales must be None for {dtype_name(dtype)} pages, got tensors.")
    given = "value_scales" if key_scales is None else "key_scales"
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if scales is None:
            raise ValueError(f"{name} must be given with {given}, got None.")
        shapes.check(name, scales, "N Hk P")
        check_dtype(name, scales, torch.float32)
        check_device(name, scales, key_pages.device, "key_pages")
        check_writable(name, scales)
    if value_scales is key_scales:
        raise ValueError("value_scales must be a tensor of its own, got key_scales: one would write over the other.")


_store_kv_op = torch.library.custom_op(
    "pagedkv::store_kv", _store_kv, mutates_args=("key_pages", "value_pages", "key_scales", "value_scales")
)
_store_kv_between_graphs = between_graphs(_store_kv)
