"""Device function of a softmax from a table: kernels/exp_table.py:ExpTable.exp."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import exp_table

VANISHED = tl.constexpr(exp_table.VANISHED)


@triton.jit
def exp_by_table(x, Entries, Powers, FORM: tl.constexpr):
    """e^x, float32, for x <= 0, of the table of FORM.table_steps intervals; NaN stays NaN.

    Entries and Powers: kernels/exp_table.py:ExpTensors.
    """
    shape: tl.constexpr = x.shape
    # In one dimension: the compiler of Triton 3.6 fails on the layouts that two make of the selects below.
    x = tl.ravel(x)
    num_steps: tl.constexpr = FORM.table_steps * 1.0
    # Of NaN and -inf no index may be made; of what is left here none is above that of the last power.
    is_near = x >= -VANISHED
    # Above 0, which counts as 0, is x where the product before the subtraction was not rounded: a fused one.
    steps = tl.maximum(tl.where(is_near, x, 0.0) * -FORM.steps_per_unit, 0.0)
    ranges = tl.math.div_rn(steps, num_steps).to(tl.int32)
    # Rounding may put it a little outside of the table.
    place = tl.minimum(tl.maximum(steps - ranges.to(tl.float32) * num_steps, 0.0), num_steps)
    below = tl.minimum(place.to(tl.int32), FORM.table_steps - 1)
    low, high = tl.load(Entries + below), tl.load(Entries + below + 1)
    result = (low + (place - below.to(tl.float32)) * (high - low)) * tl.load(Powers + ranges)
    return tl.reshape(tl.where(is_near, result, tl.where(x != x, x, 0.0)), shape)
