"""What all ops ask of K/V pages: layout, dtype, strides; and of the indices that name places in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._compile import _disable_dynamo as between_graphs  # unlike torch.compiler.disable imports Dynamo when called

from ..shapes import Shapes, check_choice, check_device, check_floating, check_last_dim_contiguous

__all__ = [
    "between_graphs",
    "check_ids",
    "check_kv_pages",
    "check_memory",
    "check_no_grad",
    "check_order",
    "check_slots",
    "check_writable",
    "fits_graph",
    "mark_written",
    "may_overlap_itself",
    "memory_address",
    "to_nhd",
]


def to_nhd(key_pages: torch.Tensor, value_pages: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Views in NHD order; back ends see no other layout, only strides."""
    check_choice("layout", layout, ("NHD", "HND"))
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if not isinstance(pages, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(pages).__name__}.")
        if pages.is_neg():
            raise ValueError(f"{name} must hold its values as they are, got a negated view.")
        if pages.dim() != 4:
            expected = "[N, P, Hk, D]" if layout == "NHD" else "[N, Hk, P, D]"
            raise ValueError(f"{name} must have shape {expected} (layout {layout}), got {list(pages.shape)}.")
    if layout == "HND":
        return key_pages.transpose(1, 2), value_pages.transpose(1, 2)
    return key_pages, value_pages


def fits_graph(*pages: torch.Tensor) -> bool:
    """Whether a compiled graph may hold an op that writes these pages; otherwise it must run between graphs.

    When views that a graph writes interleave, torch.compile (2.13) keeps the storage offsets that it traced and would
    send the writes of every later layer of a "page_first" pool to the first one. Contiguous pages do not interleave.
    """
    return all(isinstance(view, torch.Tensor) and view.is_contiguous() for view in pages)


def check_kv_pages(
    shapes: Shapes,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    layout: str = "NHD",
    *,
    quantised: bool = False,
) -> None:
    """Binds N, P, Hk, D, Dv from pages that are already in NHD order; `quantised` lets int8 and float8 pages pass."""
    shapes.check("key_pages", key_pages, "N P Hk D")
    shapes.check("value_pages", value_pages, "N P Hk Dv")
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        check_floating(name, pages, quantised=quantised)
        check_last_dim_contiguous(name, pages)
        check_device(name, pages, key_pages.device, "key_pages")
    if key_pages.dtype != value_pages.dtype:
        raise TypeError(f"value_pages must have the dtype of key_pages, {key_pages.dtype}, got {value_pages.dtype}.")


def check_writable(name: str, pages: torch.Tensor) -> None:
    """Refuses a tensor two of whose elements may share memory: an expanded one, or one whose strides do not nest."""
    if pages.is_contiguous() or not pages.numel():
        return
    shape, strides = pages.shape, pages.stride()
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        if size > 1 and stride == 0:
            raise ValueError(f"{name} must not be expanded, got stride 0 in dim {dim} of {list(shape)}.")
    if may_overlap_itself(shape, strides):
        raise ValueError(f"{name} must not overlap itself, got strides {list(strides)} of {list(shape)}.")


def may_overlap_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements may be one place in memory: strides in elements that do not nest."""
    if 0 in shape:
        return False
    reach = 0  # the farthest element of the dims so far
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def memory_address(tensor: torch.Tensor) -> int:
    """The address of the first element; 0 for a tensor without memory: a fake one, one whose memory was taken away."""
    kind = type(tensor)
    try:
        # Fake tensors have an address to give, of nothing, and warn.
        is_plain = kind is torch.Tensor or kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        return tensor.data_ptr() if is_plain else 0
    except RuntimeError:  # what a transform wraps says so itself
        return 0


def check_memory(**tensors: torch.Tensor | None) -> None:
    """Refuses elements without memory."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and not memory_address(tensor):
            raise ValueError(
                f"{name} must have memory, got a {type(tensor).__name__} of {tensor.numel()} elements without."
            )


def mark_written(*tensors: torch.Tensor) -> None:
    """Tells autograd that a native kernel wrote in place: a graph that saved the old values then says so itself."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def check_no_grad(**tensors: torch.Tensor | None) -> None:
    """Refuses, while gradients are recorded, a tensor that needs one: pages keep values, the graph would be lost."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient, got requires_grad=True. "
                "Call under torch.no_grad() or torch.inference_mode(), or pass tensor.detach()."
            )


def check_slots(name: str, slots: torch.Tensor, num_slots: int) -> None:
    """Refuses a slot beyond the pool; negative ones mean "skip" and pass."""
    if slots.numel() and int(slots.max()) >= num_slots:
        entry = int((slots >= num_slots).int().argmax())
        raise ValueError(f"{name} must be below {num_slots} (N * P slots), got {int(slots[entry])} at entry {entry}.")


def check_ids(name: str, ids: torch.Tensor, num_pages: int, owner: str) -> None:
    """Refuses a page id outside [0, num_pages)."""
    if ids.numel() and (int(ids.max()) >= num_pages or int(ids.min()) < 0):
        entry = int(((ids >= num_pages) | (ids < 0)).int().argmax())
        raise ValueError(
            f"{name} must be in [0, {num_pages}) (the pages of {owner}), got {int(ids[entry])} at entry {entry}."
        )


def check_order(src: torch.Tensor, dst: torch.Tensor, one_tensor: bool) -> None:
    """Refuses copies whose outcome would depend on their order."""
    seen: set[int] = set()
    for entry, page in enumerate(dst.tolist()):
        if page in seen:
            raise ValueError(f"dst must name each page once, got page {page} again at entry {entry}.")
        seen.add(page)
    if one_tensor:
        read = set(src.tolist())
        for page in dst.tolist():
            if page in read:
                raise ValueError(f"dst must not name a page of src within one tensor, got page {page} in both.")
