"""Writes new latents and rope keys into their slots."""

from __future__ import annotations

import torch

from ..shapes import Shapes, check_device, check_dtype, check_floating, check_last_dim_contiguous
from ..spec import CACHE_DTYPES
from .backend import OpCall, select
from .pages import between_graphs, check_no_grad, check_writable, fits_graph

__all__ = ["store_mla"]


def store_mla(
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Writes latents and rope keys of new tokens into their slots, in place: `store_kv` for pages without heads.

    Shapes: latent [T, C]; rope [T, R]; latent_pages [N, P, C]; rope_pages [N, P, R], often views of one [N, P, C + R];
            slot_mapping [T] int64. R may be 0: rope and rope_pages None or of width 0. The dtype is that of the pages.
            Last dims are contiguous, other strides are free.
    Slots:  slot = page * P + offset. A negative slot is skipped. Duplicates: the last one wins.
    When:   after the pages are reserved, before the attention of the same step.
    Owns:   writes only the named slots; every other byte is unchanged. Nothing is written if the call raises.
            latent and rope may lie in the pages: they count as they were before the call.
    Raises: ValueError, TypeError for a shape, dtype, device or slot that breaks the lines above, for expanded pages,
            and for a tensor that requires a gradient while gradients are recorded.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1. Runs the op store_kv: kernels/reference/store_kv.py.

    >>> pages = torch.zeros(4, 16, 40 + 8)
    >>> store_mla(torch.ones(3, 40), torch.ones(3, 8), pages[..., :40], pages[..., 40:], torch.tensor([0, -1, 16]))
    >>> pages.sum(dim=(1, 2)).tolist()
    [48.0, 48.0, 0.0, 0.0]
    """
    if torch.is_grad_enabled():
        check_no_grad(latent=latent, rope=rope, latent_pages=latent_pages, rope_pages=rope_pages)
    if not torch.compiler.is_compiling():
        _store_mla(latent, rope, latent_pages, rope_pages, slot_mapping, backend)
    elif fits_graph(latent_pages, latent_pages if rope_pages is None else rope_pages):
        _store_mla_op(latent, rope, latent_pages, rope_pages, slot_mapping, backend)
    else:
        _store_mla_between_graphs(latent, rope, latent_pages, rope_pages, slot_mapping, backend)


def _store_mla(
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    backend: str,
) -> None:
    # Looking once costs a fraction of checking rule by rule, which is what finds the words for an error.
    if not _is_plainly_right(latent, rope, latent_pages, rope_pages, slot_mapping):
        _check_tensors(latent, rope, latent_pages, rope_pages, slot_mapping)
    rope = latent[:, :0] if rope is None else rope
    rope_pages = latent_pages[..., :0] if rope_pages is None else rope_pages
    call = OpCall("store_kv", latent_pages.device.type, (latent_pages.dtype, rope_pages.dtype))
    # One head: latents are its keys, rope keys its values; no scales.
    new, pages = (latent[:, None], rope[:, None]), (latent_pages[:, :, None], rope_pages[:, :, None])
    select(call, backend)(*new, *pages, slot_mapping, None, None)


def _is_plainly_right(
    latent: object, rope: object, latent_pages: object, rope_pages: object, slot_mapping: object
) -> bool:
    """True only for what `_check_tensors` lets pass."""
    if not (
        isinstance(latent, torch.Tensor)
        and isinstance(rope, torch.Tensor)
        and isinstance(latent_pages, torch.Tensor)
        and isinstance(rope_pages, torch.Tensor)
        and isinstance(slot_mapping, torch.Tensor)
        and latent.dim() == rope.dim() == 2
        and latent_pages.dim() == 3
    ):
        return False
    (num_tokens, latent_dim), rope_dim = latent.shape, rope.shape[1]
    num_pages, page_size, dtype, device = *latent_pages.shape[:2], latent_pages.dtype, latent_pages.device
    return bool(
        rope.shape[0] == num_tokens
        and slot_mapping.shape == (num_tokens,)
        and latent_pages.shape[2] == latent_dim
        and rope_pages.shape == (num_pages, page_size, rope_dim)
        and latent.stride(1) == rope.stride(1) == latent_pages.stride(2) == rope_pages.stride(2) == 1
        and 0 not in latent_pages.stride()
        and 0 not in rope_pages.stride()
        and dtype in CACHE_DTYPES
        and latent.dtype == rope.dtype == rope_pages.dtype == dtype
        and slot_mapping.dtype == torch.int64
        and latent.device == rope.device == rope_pages.device == slot_mapping.device == device
        and not (latent.is_neg() or rope.is_neg() or latent_pages.is_neg() or rope_pages.is_neg())
        and not slot_mapping.is_neg()
    )


def _check_tensors(
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> None:
    shapes = Shapes()
    shapes.check("latent_pages", latent_pages, "N P C")
    if rope_pages is None:
        shapes.bind("R", 0, "rope_pages = None")
    else:
        shapes.check("rope_pages", rope_pages, "N P R")
    shapes.check("latent", latent, "T C")
    if rope is not None:
        shapes.check("rope", rope, "T R")
    elif shapes["R"]:
        raise ValueError(f"rope must be given for rope_pages with R = {shapes['R']}, got None.")
    shapes.check("slot_mapping", slot_mapping, "T")
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    check_device("slot_mapping", slot_mapping, latent_pages.device, "latent_pages")
    check_floating("latent_pages", latent_pages)
    for name, tensor in (
        ("latent_pages", latent_pages),
        ("rope_pages", rope_pages),
        ("latent", latent),
        ("rope", rope),
    ):
        if tensor is not None:
            check_dtype(name, tensor, latent_pages.dtype)
            check_device(name, tensor, latent_pages.device, "latent_pages")
            check_last_dim_contiguous(name, tensor)
    check_writable("latent_pages", latent_pages)
    if rope_pages is not None:
        check_writable("rope_pages", rope_pages)


_store_mla_op = torch.library.custom_op("pagedkv::store_mla", _store_mla, mutates_args=("latent_pages", "rope_pages"))
_store_mla_between_graphs = between_graphs(_store_mla)
