"""Device functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

from . import runtime  # noqa: F401  (corrects the interpreter before the first kernel)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def e4m3_to_float32(codes):
    """float8_e4m3fn from its bits, uint8: also where the hardware has no such type."""
    bits = codes.to(tl.uint32)
    magnitude = bits & 0x7F
    # Exponent and mantissa where float32 has them, 120 too low; a product restores the exponent, of subnormals too.
    value = (((bits & 0x80) << 24) | (magnitude << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def e5m2_to_float32(codes):
    """float8_e5m2 from its bits, uint8: the upper half of a float16."""
    return (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
