"""Device functions of attention: pages to numbers, turned rows, logits, sums that keep NaN where it is."""

from __future__ import annotations

import triton
import triton.language as tl

from .language import LOG2E, e4m3_to_float32, e5m2_to_float32


@triton.jit
def page_ids(PageIds, start, stop, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The page of the block of keys at `start` where one holds it, else [BLOCK], one for each key; 0 from `stop` on."""
    tokens = start if PAGE % BLOCK == 0 else start + tl.arange(0, BLOCK)
    return tl.load(PageIds + tokens // PAGE, mask=tokens < stop, other=0).to(tl.int64)


@triton.jit
def token_rows(pages, start, page_stride, token_stride, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] int64: where the rows of the keys from `start` on begin, in elements."""
    if PAGE % BLOCK == 0:
        first = pages * page_stride + (start % PAGE).to(tl.int64) * token_stride
        rows = first + tl.arange(0, BLOCK).to(tl.int64) * token_stride
    else:
        rows = pages * page_stride + ((start + tl.arange(0, BLOCK)) % PAGE).to(tl.int64) * token_stride
    return rows


@triton.jit
def load_tile(Pointer, rows, columns, exists, WIDTH: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr):
    """[rows, columns], zero for rows that do not exist and columns from WIDTH on; HAS_...: all are known to exist."""
    pointers = Pointer + rows[:, None] + columns[None, :]
    if HAS_ROWS and HAS_COLUMNS:
        tile = tl.load(pointers)
    elif HAS_ROWS:
        tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0)
    elif HAS_COLUMNS:
        tile = tl.load(pointers, mask=exists[:, None], other=0)
    else:
        tile = tl.load(pointers, mask=exists[:, None] & (columns < WIDTH)[None, :], other=0)
    return tile


@triton.jit
def numbers_of(codes, KIND: tl.constexpr, DTYPE: tl.constexpr, HAS_E4M3: tl.constexpr):
    """Elements of pages as DTYPE; float8 arrives as uint8. HAS_E4M3: the target converts float8_e4m3fn itself."""
    IS_FLOAT32: tl.constexpr = DTYPE.primitive_bitwidth == 32
    if KIND == "e4m3" and IS_FLOAT32:
        numbers = e4m3_to_float32(codes)
    elif KIND == "e4m3" and HAS_E4M3:
        numbers = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif KIND == "e4m3":
        bits = codes.to(tl.uint16)
        magnitude = bits & 0x7F
        # Exponent and mantissa where float16 has them, 8 too low; the product restores subnormals, too.
        value = (((bits & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True) * 256.0
        numbers = tl.where(magnitude == 0x7F, float("nan"), value)
    elif KIND == "e5m2" and IS_FLOAT32:
        numbers = e5m2_to_float32(codes)
    elif KIND == "e5m2":
        numbers = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    elif KIND == "integer":
        numbers = codes.to(tl.float32)
    else:
        numbers = codes
    return numbers.to(DTYPE)


@triton.jit
def to_float16_rows(rows, largest):
    """Rows [M, D] times a power of two each that puts `largest` [M] into [2^14, 2^15), as float16: and [M], the powers
    of two that undo it. Exact but for elements 2^28 times smaller than the largest."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    # Rows of zeros and of tiny numbers: no further than float32 can be multiplied back.
    exponent = tl.maximum(exponent, -100)
    up = ((14 - exponent + 127) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14 + 127) << 23).to(tl.float32, bitcast=True)
    return (rows.to(tl.float32) * up[:, None]).to(tl.float16), down


@triton.jit
def turned_tile(Pointer, rows, columns, exists, positions, Table, KIND: tl.constexpr, FORM: tl.constexpr):
    """[rows, columns] in float32, the first FORM.rope_dim columns turned by the angles of `positions`.

    Table [R, rope_dim / 2, 2]: cosine and sine at position |p|; the sine of a negative position is minus that.
    """
    is_there = exists[:, None] & (columns < FORM.head_dim)[None, :]
    tile = tl.load(Pointer + rows[:, None] + columns[None, :], mask=is_there, other=0)
    turns = is_there & (columns < FORM.rope_dim)[None, :]
    half: tl.constexpr = FORM.rope_dim // 2
    if FORM.is_interleaved:
        partner, pair, is_first = columns ^ 1, columns // 2, columns % 2 == 0
    else:
        is_first = columns < half
        pair = tl.where(is_first, columns, columns - half)
        partner = tl.where(is_first, columns + half, columns - half)
    other = tl.load(Pointer + rows[:, None] + partner[None, :], mask=turns, other=0)
    at = tl.abs(positions).to(tl.int64)[:, None] * (2 * half) + pair[None, :] * 2
    cos = tl.load(Table + at, mask=turns, other=1.0)
    sin = tl.load(Table + at + 1, mask=turns, other=0.0)
    sin = tl.where((positions < 0)[:, None] != is_first[None, :], -sin, sin)
    tile, other = numbers_of(tile, KIND, tl.float32, FORM.has_e4m3), numbers_of(other, KIND, tl.float32, FORM.has_e4m3)
    return tile * cos + other * sin


@triton.jit
def soft_capped(logits, cap):
    """cap * tanh(logits / cap)."""
    # `/` errs by 2 units in the last place on NVIDIA, which large logits make too much.
    x = logits * tl.math.div_rn(1.0, cap)
    # Near 0 the difference of exponentials would cancel; the next term of the series is below 2^-24 there.
    square = x * x
    series = -17.0 / 315.0 + square * (62.0 / 2835.0 - square * (1382.0 / 155925.0))
    series = x + x * square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series))
    small = tl.exp2(-2.0 * LOG2E * tl.abs(x))  # in (0, 1]: cannot overflow
    inverse = 1.0 / (1.0 + small)
    far = (1.0 - small) * inverse
    far = tl.fma(tl.fma(far * -1.0, 1.0 + small, 1.0 - small), inverse, far)
    return cap * tl.where(square < 0.09, series, tl.where(x < 0, -far, far))


@triton.jit
def add_weighted(weights, values, acc, PARTS: tl.constexpr, MAY_BE_INFINITE: tl.constexpr):
    """acc + weights @ values, weights [M, N] float32 as the sum of PARTS numbers of the dtype of `values` [N, D]."""
    part = weights.to(values.dtype)
    acc = tl.dot(part, values, acc, input_precision="ieee")
    if PARTS > 1:
        # Only what weighs by more than its upper part may be infinite: 0 * inf must not follow it.
        if MAY_BE_INFINITE:
            values = tl.where(is_finite(values), values, 0.0).to(values.dtype)
        rest = weights - part.to(tl.float32)
        part = rest.to(values.dtype)
        acc = tl.dot(part, values, acc, input_precision="ieee")
        if PARTS > 2:
            acc = tl.dot((rest - part.to(tl.float32)).to(values.dtype), values, acc, input_precision="ieee")
    return acc


@triton.jit
def is_finite(values):
    """Neither NaN nor infinite."""
    return tl.abs(values.to(tl.float32)) < float("inf")


@triton.jit
def add_marks(acc, visible, values):
    """acc where rows see no NaN or infinity in `values` [N, D], N <= 128; else what such a sum is."""
    numbers = values.to(tl.float32)
    # How many of each kind a row sees, in one exact product: NaN in units of 1, infinities of 2^8 and of 2^16.
    kinds = tl.where(numbers > 0, 256.0, 65536.0)
    kinds = tl.where(numbers != numbers, 1.0, kinds)
    kinds = tl.where(is_finite(numbers), 0.0, kinds)
    seen = tl.where(visible, 1.0, 0.0).to(tl.bfloat16)
    counts = tl.dot(seen, kinds.to(tl.bfloat16), input_precision="ieee").to(tl.int32)
    has_nan, has_plus, has_minus = (counts & 255) != 0, ((counts >> 8) & 255) != 0, (counts >> 16) != 0
    acc = tl.where(has_plus, acc + float("inf"), acc)
    acc = tl.where(has_minus, acc - float("inf"), acc)
    return tl.where(has_nan, float("nan"), acc)
