"""copy_pages on a GPU: runs of bytes of many pages in one launch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..pages import check_ids, check_order, mark_written
from .move_kernel import Launch, byte_span, lane_tensor, lanes_a_vector, tile_of
from .runtime import checks_bounds, num_multiprocessors
from .variant import Variant

__all__ = ["compile_variants", "copy_pages"]

# Dims of a page that the kernel steps through, besides the run of vectors.
_NUM_DIMS = 3


def copy_pages(src_pages: torch.Tensor, dst_pages: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """The page axis is the first; everything but the ids is checked, and they where that is asked for.

    A copy with an id outside of the pages that is not refused is skipped.
    """
    one_address = src_pages.numel() > 0 and src_pages.data_ptr() == dst_pages.data_ptr()
    one_tensor = one_address and src_pages.stride() == dst_pages.stride()
    if checks_bounds():
        check_ids("src", src, src_pages.shape[0], "src_pages")
        check_ids("dst", dst, dst_pages.shape[0], "dst_pages")
        check_order(src, dst, one_tensor)
    if not dst.shape[0] or not src_pages.numel() or not dst_pages.numel():
        return
    first, stop = byte_span(src_pages)
    start, end = byte_span(dst_pages)
    ids: torch.Tensor | None = src.contiguous()
    if not one_tensor and first < end and start < stop:
        # Views that may share bytes: all is read before anything is written.
        is_outside = (src < 0) | (src >= src_pages.shape[0])
        src_pages, ids = src_pages[src.masked_fill(is_outside, 0)], None
        dst = dst.masked_fill(is_outside, -1)
    for launch in _launches(src_pages, dst_pages, ids, dst.contiguous(), num_multiprocessors(dst.device)):
        launch.run(dst_pages)
    mark_written(dst_pages)


class _Dim(NamedTuple):
    """A dim of a page, with its strides in both tensors."""

    size: int
    src_stride: int
    dst_stride: int


def _launches(
    src_pages: torch.Tensor,
    dst_pages: torch.Tensor,
    src: torch.Tensor | None,  # None: 0, 1, 2, ...
    dst: torch.Tensor,
    num_multiprocessors: int,
) -> list[Launch]:
    """One launch, or, of pages with more dims than the kernel steps through, one for each index of the outermost."""
    *outer, run = _fewest_dims(src_pages, dst_pages)
    if len(outer) > _NUM_DIMS:
        axis = max(range(1, dst_pages.dim()), key=lambda at: (dst_pages.shape[at] > 1, dst_pages.stride(at)))
        parts = zip(src_pages.unbind(axis), dst_pages.unbind(axis), strict=True)
        return [launch for part in parts for launch in _launches(*part, src, dst, num_multiprocessors)]
    item = dst_pages.element_size()
    bits = 16 | src_pages.data_ptr() | dst_pages.data_ptr() | run.size * item
    pages = _Dim(1, *(pages.stride(0) if pages.shape[0] > 1 else 0 for pages in (src_pages, dst_pages)))
    for dim in (pages, *outer):
        bits |= (dim.src_stride | dim.dst_stride) * item
    num_bytes = bits & -bits
    dims = [_Dim(1, 0, 0)] * (_NUM_DIMS - len(outer)) + outer
    width = math.prod(dim.size for dim in outer) * run.size * item // num_bytes
    tile = tile_of(dst.shape[0], [width], num_bytes, num_multiprocessors)
    tensors: dict[str, Any] = {
        "Src_pages": lane_tensor(src_pages, num_bytes),
        "Dst_pages": lane_tensor(dst_pages, num_bytes),
        "Src": src,
        "Dst": dst,
    }
    numbers = {
        "num_copies": dst.shape[0],
        "num_src_pages": src_pages.shape[0],
        "num_dst_pages": dst_pages.shape[0],
    }
    for name, dim in zip(("page", "0", "1", "2"), (pages, *dims), strict=True):
        numbers[f"stride_src_{name}"] = dim.src_stride * item // num_bytes
        numbers[f"stride_dst_{name}"] = dim.dst_stride * item // num_bytes
    constexprs = {
        "SIZE_1": dims[1].size,
        "SIZE_2": dims[2].size,
        "RUN": run.size * item // num_bytes,
        "WIDTH": width,
        "LANES": lanes_a_vector(num_bytes),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_VECTORS": tile.vectors[0],
    }
    num_programs = triton.cdiv(dst.shape[0], tile.rows) * triton.cdiv(width, tile.vectors[0])
    return [Launch(_copy_pages, num_programs, tensors, numbers, constexprs)]


def _fewest_dims(src_pages: torch.Tensor, dst_pages: torch.Tensor) -> list[_Dim]:
    """A page in the order of its memory, with neighbours joined where both tensors allow it; the last is a run."""
    of_src, of_dst = src_pages.stride()[1:], dst_pages.stride()[1:]
    dims = [_Dim(*dim) for dim in zip(dst_pages.shape[1:], of_src, of_dst, strict=True) if dim[0] > 1]
    dims.sort(key=lambda dim: (dim.dst_stride, dim.src_stride))
    joined = [_Dim(1, 1, 1)]  # from the run outwards
    for dim in dims:
        inner = joined[-1]
        if (dim.src_stride, dim.dst_stride) == (inner.size * inner.src_stride, inner.size * inner.dst_stride):
            joined[-1] = inner._replace(size=inner.size * dim.size)
        else:
            joined.append(dim)
    return joined[::-1]


_STRIDES = [f"stride_{of}_{dim}" for of in ("src", "dst") for dim in ("page", "0", "1", "2")]


@triton.jit(do_not_specialize=["num_copies", "num_src_pages", "num_dst_pages", *_STRIDES])
def _copy_pages(
    Src_pages,
    Dst_pages,
    Src,
    Dst,
    num_copies: tl.int64,
    num_src_pages: tl.int64,
    num_dst_pages: tl.int64,
    stride_src_page: tl.int64,  # in vectors, as all strides
    stride_src_0: tl.int64,
    stride_src_1: tl.int64,
    stride_src_2: tl.int64,
    stride_dst_page: tl.int64,
    stride_dst_0: tl.int64,
    stride_dst_1: tl.int64,
    stride_dst_2: tl.int64,
    SIZE_1: tl.constexpr,  # of the dims of a page [.., SIZE_1, SIZE_2, RUN]
    SIZE_2: tl.constexpr,
    RUN: tl.constexpr,  # vectors
    WIDTH: tl.constexpr,  # vectors of a page
    LANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
):
    """A program copies one chunk of BLOCK_ROWS pages."""
    num_chunks: tl.constexpr = (WIDTH + BLOCK_VECTORS - 1) // BLOCK_VECTORS
    program = tl.program_id(0).to(tl.int64)
    entry = program // num_chunks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = entry < num_copies
    dst_page = tl.load(Dst + entry, mask=exists, other=-1)
    src_page = entry
    if Src is not None:
        src_page = tl.load(Src + entry, mask=exists, other=-1)
    is_copied = (src_page >= 0) & (src_page < num_src_pages) & (dst_page >= 0) & (dst_page < num_dst_pages)
    chunk = program % num_chunks
    if num_chunks * BLOCK_VECTORS * LANES < 2**31:  # divisions of 32 bits are faster
        chunk = chunk.to(tl.int32)
    lane = chunk * (BLOCK_VECTORS * LANES) + tl.arange(0, BLOCK_VECTORS * LANES)
    vector = lane // LANES
    if RUN == WIDTH:
        src_lane = lane.to(tl.int64)
        dst_lane = src_lane
    else:
        run, within = (vector // RUN).to(tl.int64), vector % RUN * LANES + lane % LANES
        index_0, index_1, index_2 = run // (SIZE_1 * SIZE_2), run // SIZE_2 % SIZE_1, run % SIZE_2
        src_lane = (index_0 * stride_src_0 + index_1 * stride_src_1 + index_2 * stride_src_2) * LANES + within
        dst_lane = (index_0 * stride_dst_0 + index_1 * stride_dst_1 + index_2 * stride_dst_2) * LANES + within
    mask = is_copied[:, None] & (vector < WIDTH)[None, :]
    copied = tl.load(Src_pages + (src_page * (stride_src_page * LANES))[:, None] + src_lane[None, :], mask=mask)
    tl.store(Dst_pages + (dst_page * (stride_dst_page * LANES))[:, None] + dst_lane[None, :], copied, mask=mask)


def compile_variants() -> list[Variant]:
    """Whole pages, pages of many layers, runs of each width and none."""
    variants = []
    for name, num_copies, shape, dtype, change in (
        ("whole-pages", 16, (1024, 16, 8, 128), torch.bfloat16, None),
        ("all-layers", 256, (64, 1024, 16384), torch.bfloat16, lambda pages: pages.transpose(0, 1)),
        ("heads-first", 16, (1024, 8, 16, 128), torch.float16, lambda pages: pages.transpose(1, 2)),
        ("gaps", 16, (1024, 5, 3, 16), torch.int8, lambda pages: pages[:, :4, :, :12]),
        ("odd-width", 100_000, (200_000, 3), torch.float16, None),
        ("no-run", 16, (100, 3, 5, 8), torch.int8, lambda pages: pages[:, :2, :4, ::3]),
    ):
        pages = torch.empty(shape, dtype=dtype, device="meta")
        ids = pages.new_empty(num_copies, dtype=torch.int64)
        dst_pages = torch.empty_like(pages) if change is None else change(pages)
        (launch,) = _launches(pages if change is None else torch.empty_like(dst_pages), dst_pages, ids, ids, 132)
        variants.append(launch.variant(name))
        if name == "whole-pages":
            (launch,) = _launches(pages, dst_pages, None, ids, 132)
            variants.append(launch.variant(f"{name}-of-a-copy"))
    return variants
