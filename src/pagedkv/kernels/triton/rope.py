"""apply_rope: a program takes tokens, computes their angles once, and turns head after head by them."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..kept_tensors import kept_tensors
from ..rope import RotaryEmbedding
from .runtime import IS_INTERPRETED, num_multiprocessors, on_device
from .variant import Variant

__all__ = ["RopeTile", "apply_rope", "compile_variants", "heads_of_program", "rope_tile", "turns_of_pairs"]

# Pairs of a tile: 8 a thread of 4 warps, 16 bytes of 16-bit numbers. Interpreted, it is the operations that cost.
_TILE = 2**17 if IS_INTERPRETED else 1024
# Of fewer tokens, tiles of four: more programs.
_MANY_TOKENS = 16 if IS_INTERPRETED else 1024

# Of a quarter of a turn, cut into 2**64.
_RADIANS = tl.constexpr(math.pi / 2 / 2**64)
_PI = Fraction(0x3243F6A8885A308D313198A2E03707344, 2**128)


@triton.jit
def cos_sin(positions, turns, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Of positions [T], int64: cosines and sines [T, BLOCK_HALF], computed in float64 and rounded once.

    turns: [HALF] int64, what each pair turns a position, in 2**-64 of a full turn.
    """
    pair = tl.arange(0, BLOCK_HALF)
    # Whole turns fall off as the product wraps: no position, of any size or sign, needs a reduction by 2 pi, whose code
    # for large angles would cost most of the registers.
    phase = positions[:, None] * tl.load(turns + pair, mask=pair < HALF, other=0)[None, :]
    quarter = ((phase + 2**61) >> 62).to(tl.int32)
    x = (phase << 2).to(tl.float64) * _RADIANS
    # Taylor series up to pi / 4, where the terms left out are below 2**-54.
    y = x * x
    sin = y * (1 / 6227020800) - 1 / 39916800
    sin = (((sin * y + 1 / 362880) * y - 1 / 5040) * y + 1 / 120) * y - 1 / 6
    sin = (sin * y * x + x).to(tl.float32)
    cos = y * (-1 / 87178291200) + 1 / 479001600
    cos = ((((cos * y - 1 / 3628800) * y + 1 / 40320) * y - 1 / 720) * y + 1 / 24) * y - 0.5
    cos = (cos * y + 1).to(tl.float32)
    is_odd = (quarter & 1) == 1
    turned_cos, turned_sin = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    is_left, is_below = ((quarter + 1) & 2) == 2, (quarter & 2) == 2
    return tl.where(is_left, -turned_cos, turned_cos), tl.where(is_below, -turned_sin, turned_sin)


@triton.jit
def rotated_pairs(rows, mask, cos, sin, HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """The turned columns of the rows that start at rows [T, 1], in their dtype: first and second of each pair."""
    BLOCK_HALF: tl.constexpr = cos.shape[1]
    if IS_INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.load(rows + column, mask=mask & (column < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(both.to(tl.float32), (cos.shape[0], BLOCK_HALF, 2)))
    else:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        mask = mask & (pair < HALF)
        first = tl.load(rows + pair, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(rows + (pair + HALF), mask=mask, other=0.0).to(tl.float32)
    # One product is fused by name: left to the compiler, kernels would differ in which, and so in the last bit.
    # Times -1, since a minus sign subtracts from 0 in Triton, which loses the sign of zeros.
    dtype = rows.dtype.element_ty
    return tl.fma(first, cos, second * sin * -1.0).to(dtype), tl.fma(second, cos, first * sin).to(dtype)


@triton.jit
def store_pairs(rows, first, second, mask, HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """Writes pairs [T, BLOCK_HALF] to the columns that they were turned in, of the rows that start at rows [T, 1]."""
    BLOCK_HALF: tl.constexpr = first.shape[1]
    if IS_INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * BLOCK_HALF))
        tl.store(rows + column, both, mask=mask & (column < 2 * HALF))
    else:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        mask = mask & (pair < HALF)
        tl.store(rows + pair, first, mask=mask)
        tl.store(rows + (pair + HALF), second, mask=mask)


@triton.jit
def rotate_rows(
    x,
    out,
    mask,
    cos,
    sin,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    """Turns the rows that start at x into those that start at out, both pointers [T, 1]."""
    first, second = rotated_pairs(x, mask, cos, sin, HALF, IS_INTERLEAVED)
    store_pairs(out, first, second, mask, HALF, IS_INTERLEAVED)
    if BLOCK_REST > 0:
        column = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        mask = mask & (column < DIM)
        tl.store(out + column, tl.load(x + column, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "heads_of_program", "stride_position"])
def _apply_rope_kernel(
    X,
    Positions,
    Turns,
    Out,
    num_tokens,
    num_heads,
    stride_x_token,
    stride_x_head,
    stride_position,
    heads_of_program,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    programs = tl.cdiv(num_heads, heads_of_program)
    token = tl.program_id(0).to(tl.int64) // programs * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    first_head = tl.program_id(0) % programs * heads_of_program
    is_token = token < num_tokens
    position = tl.load(Positions + token * stride_position, mask=is_token, other=0)
    cos, sin = cos_sin(position, Turns, HALF, BLOCK_HALF)
    X += (token * stride_x_token)[:, None]
    Out += (token * num_heads * DIM)[:, None]
    for head in range(first_head, tl.minimum(first_head + heads_of_program, num_heads)):
        rows = X + tl.cast(head, tl.int64) * stride_x_head
        rotate_rows(rows, Out + head * DIM, is_token[:, None], cos, sin, DIM, HALF, BLOCK_REST, IS_INTERLEAVED)


class RopeTile(NamedTuple):
    """The constexprs of a rotation, by the names of the kernels' parameters."""

    DIM: int
    HALF: int
    BLOCK_TOKENS: int
    BLOCK_HALF: int
    BLOCK_REST: int
    IS_INTERLEAVED: bool

    @property
    def num_warps(self) -> int:
        """As many threads as pairs, four warps at most."""
        return max(min(self.BLOCK_TOKENS * self.BLOCK_HALF // 32, 4), 1)


def rope_tile(rope: RotaryEmbedding, head_dim: int, num_tokens: int) -> RopeTile:
    """One, four or as many tokens as a tile holds: three kernels a model, whatever its batches."""
    block_half = triton.next_power_of_2(rope.dim // 2)
    block_rest = triton.next_power_of_2(head_dim - rope.dim) if head_dim > rope.dim else 0
    room = max(_TILE // max(block_half, block_rest), 1)
    most = 1 if num_tokens < 4 else 4 if num_tokens < _MANY_TOKENS else triton.next_power_of_2(num_tokens)
    block_tokens = min(room, most)
    return RopeTile(head_dim, rope.dim // 2, block_tokens, block_half, block_rest, rope.interleaved)


def heads_of_program(num_tiles: int, num_heads: int, device: torch.device) -> int:
    """How many heads a program turns: all, by the same angles, unless that leaves multiprocessors idle."""
    wanted = -(-8 * num_multiprocessors(device) // num_tiles)
    return -(-num_heads // min(wanted, num_heads))


def turns_of_pairs(rope: RotaryEmbedding, device: torch.device) -> torch.Tensor:
    """What each pair turns a position, int64 [dim / 2] in 2**-64 of a turn, rounded once, whole turns left out.

    Kept on the device: only the first call copies it there.
    """
    return _turns(rope, device)[0]


# Few and small, and they stay, because a captured graph reads those that it was captured with.
@kept_tensors(maxsize=1024)
def _turns(rope: RotaryEmbedding, device: torch.device) -> tuple[torch.Tensor]:
    turns = [round(Fraction(frequency) / (2 * _PI) * 2**64) for frequency in rope.inverse_frequencies().tolist()]
    return (torch.tensor([(turn + 2**63) % 2**64 - 2**63 for turn in turns], device=device),)


def apply_rope(x: torch.Tensor, positions: torch.Tensor, rope: RotaryEmbedding, out: torch.Tensor) -> None:
    """Fills out; everything is checked."""
    num_tokens, num_heads, head_dim = x.shape
    if not out.numel():
        return
    tile = rope_tile(rope, head_dim, num_tokens)
    num_tiles = -(-num_tokens // tile.BLOCK_TOKENS)
    heads = heads_of_program(num_tiles, num_heads, x.device)
    with on_device(x):
        _apply_rope_kernel[(num_tiles * -(-num_heads // heads),)](
            x,
            positions,
            turns_of_pairs(rope, x.device),
            out,
            num_tokens,
            num_heads,
            x.stride(0),
            x.stride(1),
            positions.stride(0),
            heads,
            **tile._asdict(),
            num_warps=tile.num_warps,
        )


def compile_variants() -> list[Variant]:
    """The dtypes, both pairings, columns that stay, odd widths, and each number of tokens of a tile."""
    cases = [
        ("bf16", RotaryEmbedding(128), 128, 5000),
        ("fp16", RotaryEmbedding(128), 128, 1),
        ("fp32", RotaryEmbedding(64), 128, 64),
        ("bf16", RotaryEmbedding(128, interleaved=True), 128, 5000),
        ("bf16", RotaryEmbedding(24), 72, 64),
        ("fp32", RotaryEmbedding(512, interleaved=True), 576, 64),
    ]
    variants = []
    for dtype, rope, head_dim, num_tokens in cases:
        tile = rope_tile(rope, head_dim, num_tokens)
        strides = ("stride_x_token", "stride_x_head")
        pointers: dict[str, Any] = {"X": f"*{dtype}", "Positions": "*i64", "Turns": "*i64", "Out": f"*{dtype}"}
        numbers = ("num_tokens", "num_heads", *strides, "stride_position", "heads_of_program")
        variants.append(
            Variant(
                f"apply_rope-{dtype}-{rope.dim}-of-{head_dim}-T{num_tokens}{'-interleaved' * rope.interleaved}",
                _apply_rope_kernel,
                {**pointers, **dict.fromkeys(numbers, "i32")},
                tile._asdict(),
                frozenset((*pointers, *(strides if head_dim % 16 == 0 else ()))),
                tile.num_warps,
            )
        )
    return variants
