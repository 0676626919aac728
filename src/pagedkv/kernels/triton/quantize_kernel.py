"""Quantising a tile of rows, by the rule of `quantize_kv`: bit for bit what plain torch gives."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .runtime import IS_INTERPRETED

__all__ = ["codes_of", "rows_a_program"]

_SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
_LARGEST_FINITE = tl.constexpr(torch.finfo(torch.float32).max)
# Added to a float32 and subtracted again, it leaves the nearest integer, ties to even: its last place is 1.
_ROUNDS_TO_INTEGER = tl.constexpr(1.5 * 2**23)
# Its last place is the smallest float8_e4m3fn, 2**-9.
_ROUNDS_TO_SUBNORMAL = tl.constexpr(2.0**14)
_SMALLEST_NORMAL_E4M3 = tl.constexpr(2.0**-6)

# Elements of a tile: 16 a thread of four warps. Interpreted, a program costs by its steps, not by its size.
_TILE = 8192 if IS_INTERPRETED else 2048


def codes_of(dtype: torch.dtype, has_e4m3: bool) -> str:
    """The constexpr CODES for codes of this dtype: float8_e4m3fn is made of bits where no instruction makes it."""
    if dtype == torch.int8:
        return "int8"
    return "e4m3" if has_e4m3 else "e4m3 of bits"


def rows_a_program(dim: int) -> dict[str, int]:
    """The tile of rows of `dim` elements."""
    width = triton.next_power_of_2(max(dim, 1))
    return {"BLOCK_ROWS": max(_TILE // width, 1), "BLOCK_DIM": width}


@triton.jit
def quantize_tile(x, CODES: tl.constexpr):
    """x [BLOCK_ROWS, BLOCK_DIM] float32, 0 beyond the rows' ends; gives codes (uint8, int8) and scales [BLOCK_ROWS]."""
    is_finite = tl.abs(x) <= _LARGEST_FINITE
    # Infinity for rows with NaN, too, which a maximum of them passes over.
    amax = tl.max(tl.where(is_finite, tl.abs(x), float("inf")), 1)
    row_is_finite = amax <= _LARGEST_FINITE
    largest = tl.full(amax.shape, 127.0 if CODES == "int8" else 448.0, tl.float32)
    scale = tl.maximum(tl.math.div_rn(tl.where(row_is_finite, amax, 0.0), largest), _SMALLEST_SCALE)
    scale = tl.where(amax == 0, 1.0, scale)
    quotient = tl.math.div_rn(tl.where(row_is_finite[:, None], x, 0.0), tl.broadcast_to(scale[:, None], x.shape))
    if CODES == "int8":
        codes = ((quotient + _ROUNDS_TO_INTEGER) - _ROUNDS_TO_INTEGER).to(tl.int8)
    elif CODES == "e4m3":
        codes = quotient.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = float32_to_e4m3(quotient)
    return codes, tl.where(row_is_finite, scale, float("nan"))


@triton.jit
def float32_to_e4m3(x):
    """The bits of float8_e4m3fn, uint8, to nearest, ties to even; |x| at most 448."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # Half a place, less one where the last place that stays is even; then exponents of 8 bits with bias 127 become
    # ones of 4 bits with bias 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    sum_bits = (tl.abs(x) + _ROUNDS_TO_SUBNORMAL).to(tl.uint32, bitcast=True)
    subnormal = sum_bits & 0x7FFFFF
    return (sign | tl.where(tl.abs(x) < _SMALLEST_NORMAL_E4M3, subnormal, normal)).to(tl.uint8)


@triton.jit
def quantize_rows(
    Source,
    Codes,
    Scales,
    source_row,  # [BLOCK_ROWS] offsets in elements, int64
    codes_row,
    scale_at,
    is_read,
    is_written,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CODES: tl.constexpr,
):
    """Quantises rows of DIM elements into theirs of the codes, each with its scale."""
    column = tl.arange(0, BLOCK_DIM)
    exists = (column < DIM)[None, :]
    x = tl.load(Source + source_row[:, None] + column[None, :], mask=is_read[:, None] & exists, other=0.0)
    codes, scales = quantize_tile(x.to(tl.float32), CODES)
    tl.store(Codes + codes_row[:, None] + column[None, :], codes, mask=is_written[:, None] & exists)
    tl.store(Scales + scale_at, scales, mask=is_written)
