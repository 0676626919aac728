"""Corrections to the interpreter of Triton 3.6, so that it computes what a GPU does.

Without them a dot product of bfloat16 multiplies the bits as integers, float32 is cut to bfloat16 and float8 where it
should be rounded, float8 NaNs are read as numbers, the larger of NaN and a number is NaN, and a loop up to a loaded
number fails on numpy 2.4. tests/kernels/triton/test_interpreter.py shows each of these. What stays wrong, and is not
used: casts between integers and bfloat16 or float8 that do not go through float32, and argmax of NaN.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["install"]

_DTYPES = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NO_ARITHMETIC = (tl.bfloat16, tl.float8e4nv, tl.float8e5)

_original_dot = interpreter.InterpreterBuilder.create_dot
_original_tensor = interpreter._patch_lang_tensor
_original_launch = interpreter.GridExecutor.__call__
_original_reduce = interpreter.ReduceOps.apply_impl
_patched: set[Any] = set()
_launching = threading.RLock()


def install() -> None:
    """Makes the corrections, for the whole process."""
    interpreter._convert_float = _convert_float
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.InterpreterBuilder.create_dot = _dot
    # As instructions do, these pass over NaN; those that do not are create_maximumf and create_minimumf.
    interpreter.InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    interpreter.InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.GridExecutor.__call__ = _launch
    interpreter.ReduceOps.apply_impl = _reduce


def _convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Numbers of one dtype as those of another, both as unsigned bits: to nearest even, NaN and infinities kept."""
    data = np.ascontiguousarray(data)
    integers = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[data.itemsize]
    values = torch.from_numpy(data.view(integers)).view(_DTYPES[source])
    converted = values.double() if target is tl.float64 else values.float().to(_DTYPES[target])
    size = converted.element_size()
    bits = converted.contiguous().view(_INTEGERS[size]).numpy().view(_UNSIGNED[size])
    return bits.reshape(data.shape)


def _dot(self: Any, a: Any, b: Any, sum_: Any, precision: Any, max_inexact: Any) -> Any:
    return _original_dot(self, _as_float32(a), _as_float32(b), sum_, precision, max_inexact)


def _as_float32(handle: Any) -> Any:
    dtype = handle.dtype.scalar
    if dtype not in _NO_ARITHMETIC:
        return handle
    return interpreter.TensorHandle(_convert_float(handle.data, dtype, tl.float32, None).view(np.float32), tl.float32)


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _original_tensor(tensor, scope)
    # numpy refuses int() of an array with a dimension.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Patches the language for a device function once, not at each call, which is half of the time."""
    if self.fn not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except interpreter.InterpreterError:
        raise
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    """One at a time: a launch changes the language for all threads."""
    with _launching, np.errstate(all="ignore"):  # NaN, infinities and what overflows are results here, as on a GPU
        return _original_launch(self, *args, **kwargs)


def _reduce(self: Any, input: Any) -> Any:
    """As a GPU, which passes over NaN; the original warns of rows that have nothing else."""
    if self.combine_fn == tl.standard._elementwise_max:
        return self.min_max(input[0], val_reduce_op=np.fmax.reduce)
    if self.combine_fn == tl.standard._elementwise_min:
        return self.min_max(input[0], val_reduce_op=np.fmin.reduce)
    return _original_reduce(self, input)
