"""What the kernels that move rows share: how rows are cut into vectors and programs, and the tile of one program.

A row is what a token has of a tensor: heads, each a run of bytes. It is moved in vectors of 16 bytes, or of as many as
addresses, widths and strides are all multiples of; a lane holds a vector or half of one. Strides are counted in
vectors, so that the compiler knows each address to be a multiple of one and moves it with one instruction.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .runtime import IS_INTERPRETED, on_device
from .variant import Variant

__all__ = [
    "Form",
    "Launch",
    "Tile",
    "apart_from",
    "byte_span",
    "lane_tensor",
    "lanes_a_vector",
    "tile_of",
    "vector_bytes",
]

_LANES = {16: tl.int64, 8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
_NUM_WARPS = 4
# Four vectors of 16 bytes a thread are on the way at once. Interpreted, a program costs by its steps, not by its size.
_TILE = 4096 if IS_INTERPRETED else 512
# One a thread, where there are too few tokens for larger tiles to reach every multiprocessor four times.
_SMALL_TILE = 512 if IS_INTERPRETED else 128


class Launch(NamedTuple):
    """One launch of a kernel: tensors or None, numbers of 64 bits, and constexprs, by the names of its parameters."""

    kernel: Any
    num_programs: int
    tensors: Mapping[str, Any]
    numbers: Mapping[str, int]
    constexprs: Mapping[str, Any]

    def run(self, device_of: torch.Tensor) -> None:
        """Launches on the device of this tensor."""
        with on_device(device_of):
            self.kernel[(self.num_programs,)](**self.tensors, **self.numbers, **self.constexprs, num_warps=_NUM_WARPS)

    def variant(self, name: str) -> Variant:
        """What the compile tests compile for this launch."""
        signature, constexprs = dict.fromkeys(self.numbers, "i64"), dict(self.constexprs)
        for parameter, tensor in self.tensors.items():
            if tensor is None:
                constexprs[parameter] = None
            else:
                signature[parameter] = triton.runtime.jit.mangle_type(tensor)
        aligned = frozenset(name for name, of in self.tensors.items() if of is not None and of.data_ptr() % 16 == 0)
        return Variant(name, self.kernel, signature, constexprs, aligned, num_warps=_NUM_WARPS)


class Form(NamedTuple):
    """What of a tensor decides how it is moved; equal for the layers of a pool, so that what follows is kept."""

    shape: torch.Size
    strides: tuple[int, ...]
    element_size: int
    misalignment: int  # address modulo 16

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        """That of this tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.element_size(), tensor.data_ptr() % 16)

    def strides_in_vectors(self, num_bytes: int) -> tuple[int, ...]:
        """Of all dims but the last, which is one run; 0 for a dim that is no step, whose stride may be anything."""
        dims = zip(self.shape[:-1], self.strides[:-1], strict=True)
        return tuple(stride * self.element_size // num_bytes if size > 1 else 0 for size, stride in dims)


def vector_bytes(*forms: Form) -> int:
    """The largest of 16, 8, 4, 2, 1 that divides the addresses, the sizes of the last dim and the strides of others."""
    bits = 16
    for form in forms:
        bits |= form.misalignment | form.shape[-1] * form.element_size
        for stride in form.strides_in_vectors(1):
            bits |= stride
    return bits & -bits


def lanes_a_vector(num_bytes: int) -> int:
    """How many lanes hold a vector."""
    return 2 if num_bytes == 16 else 1


def lane_tensor(tensor: torch.Tensor, num_bytes: int) -> Any:
    """The same memory, in the integers that lanes hold."""
    return triton.reinterpret(tensor, _LANES[num_bytes])


def byte_span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses [first, stop) between which all elements lie; an empty one has an empty span."""
    first = tensor.data_ptr()
    return first, first + _num_bytes_spanned(tensor.shape, tensor.stride(), tensor.element_size())


@functools.lru_cache(maxsize=4096)
def _num_bytes_spanned(shape: torch.Size, strides: tuple[int, ...], element_size: int) -> int:
    if not shape.numel():
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))) * element_size


def apart_from(tokens: torch.Tensor, written: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tokens, or a copy where they may lie in what is written.

    Programs run in any order: what one writes must not be what another has yet to read.
    """
    first, stop = byte_span(tokens)
    if any(first < end and start < stop for start, end in map(byte_span, written)):
        return tokens.clone(memory_format=torch.contiguous_format)
    return tokens


class Tile(NamedTuple):
    """What one program moves: `rows` rows, of each tensor `vectors` of its vectors."""

    rows: int
    vectors: tuple[int, ...]


def tile_of(num_rows: int, widths: Sequence[int], num_bytes: int, num_multiprocessors: int) -> Tile:
    """For rows of tensors with `widths` vectors: enough programs to keep a device busy, few lanes without a vector."""
    num_vectors = _TILE * min(16 // num_bytes, 4)
    if num_rows * sum(widths) < 4 * num_vectors * num_multiprocessors:
        num_vectors = _SMALL_TILE
    widest = max(widths)
    block = min(_power_of_2_from(widest), num_vectors)
    # 72 vectors go into 5 blocks of 16 rather than into one of 128; 8 vectors of 16 bytes are one line of a cache.
    while block > 8 and 8 * -(-widest // block) * block > 9 * widest:
        block //= 2
    return Tile(num_vectors // block, tuple(min(_power_of_2_from(width), block) for width in widths))


def _power_of_2_from(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


@triton.jit
def lane_offsets(vector, lane, stride_head, ROW: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Of lanes: how far from the first of its row; WIDTH vectors in order of heads, ROW of them a head."""
    if ROW == WIDTH:
        return lane.to(tl.int64)
    return (vector // ROW).to(tl.int64) * (stride_head * LANES) + (vector % ROW) * LANES + lane % LANES


@triton.jit
def move_rows(
    Source,
    Target,
    source_row,  # [BLOCK_ROWS] offsets in lanes, int64
    target_row,
    is_read,
    is_written,
    chunk,
    stride_source_head,
    stride_target_head,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
):
    """Moves the vectors of one chunk of each row; rows that are not read give zeros."""
    lane = chunk.to(tl.int32) * (BLOCK_VECTORS * LANES) + tl.arange(0, BLOCK_VECTORS * LANES)
    vector = lane // LANES
    exists = (vector < WIDTH)[None, :]
    source = source_row[:, None] + lane_offsets(vector, lane, stride_source_head, ROW, WIDTH, LANES)[None, :]
    target = target_row[:, None] + lane_offsets(vector, lane, stride_target_head, ROW, WIDTH, LANES)[None, :]
    moved = tl.load(Source + source, mask=is_read[:, None] & exists, other=0)
    tl.store(Target + target, moved, mask=is_written[:, None] & exists)
