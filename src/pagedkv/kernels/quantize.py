"""Keys and values as int8 or float8 with one scale per token and head, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..shapes import Shapes, check_device, check_dtype, check_floating, check_last_dim_contiguous, dtype_name
from ..spec import SCALED_DTYPES
from .backend import OpCall, select
from .pages import check_no_grad

__all__ = ["QuantizedKV", "dequantize_kv", "quantize_kv"]


class QuantizedKV(NamedTuple):
    """Keys or values of tokens, [T, Hk, D], and their float32 scales, [T, Hk]: each stands for value * scale."""

    values: torch.Tensor
    scales: torch.Tensor


def quantize_kv(x: torch.Tensor, dtype: torch.dtype, *, backend: str = "auto") -> QuantizedKV:
    """Quantises each row of D elements with a scale of its own: what `store_kv` does when it is given scales.

    Shapes: x [T, Hk, D] float32, float16 or bfloat16, the last dim contiguous; dtype int8 or float8_e4m3fn.
            Returns values [T, Hk, D] in `dtype` and scales [T, Hk] float32, both contiguous.
    Rule:   scale = amax / 127 (float8_e4m3fn: amax / 448), amax the largest magnitude of the row, at least the smallest
            normal float32, and 1 for a row of zeros; value = x / scale, rounded to nearest, ties to even. All of it in
            float32, so every back end gives the same bits. No value saturates: amax becomes the largest one.
    NaN:    a row with NaN or infinity gets the scale NaN and zeros for values: it reads back as NaN, never as numbers.
    Raises: ValueError, TypeError for a shape, dtype or device that breaks the lines above, and for an x that requires a
            gradient while gradients are recorded.
    Reference: kernels/reference/quantize.py.

    >>> values, scales = quantize_kv(torch.tensor([[[0.5, -2.0, 4.0]]]), torch.int8)
    >>> values.tolist(), scales.tolist()
    ([[[16, -64, 127]]], [[0.031496062874794006]])
    """
    check_no_grad(x=x)
    op = _quantize_kv_op if torch.compiler.is_compiling() else _quantize_kv
    return QuantizedKV(*op(x, dtype, backend))


def dequantize_kv(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The numbers that quantised rows stand for: values * scales in float32, rounded once to `dtype`.

    Shapes: values [T, Hk, D] int8 or float8_e4m3fn; scales [T, Hk] float32. Returns [T, Hk, D] float32, float16 or
            bfloat16. A row with the scale NaN gives NaN alone.
    Raises: ValueError, TypeError for a shape, dtype or device that breaks the lines above, and for scales that require
            a gradient while gradients are recorded.

    >>> dequantize_kv(torch.tensor([[[16, -64, 127]]], dtype=torch.int8), torch.tensor([[0.5]])).tolist()
    [[[8.0, -32.0, 63.5]]]
    """
    check_no_grad(scales=scales)
    op = _dequantize_kv_op if torch.compiler.is_compiling() else _dequantize_kv
    numbers: torch.Tensor = op(values, scales, dtype)
    return numbers


def _quantize_kv(x: torch.Tensor, dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = Shapes()
    shapes.check("x", x, "T Hk D")
    check_floating("x", x)
    check_last_dim_contiguous("x", x)
    _check_choice_of_dtype(dtype, SCALED_DTYPES)
    values, scales = _empty_like_quantized(x, dtype)
    select(OpCall("quantize_kv", x.device.type, (x.dtype, dtype)), backend)(x, values, scales)
    return values, scales


def _dequantize_kv(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    shapes = Shapes()
    shapes.check("values", values, "T Hk D")
    shapes.check("scales", scales, "T Hk")
    check_dtype("values", values, *SCALED_DTYPES)
    check_dtype("scales", scales, torch.float32)
    check_device("scales", scales, values.device, "values")
    _check_choice_of_dtype(dtype, (torch.float32, torch.float16, torch.bfloat16))
    return (values.float() * scales[..., None]).to(dtype)


def _check_choice_of_dtype(dtype: object, choices: tuple[torch.dtype, ...]) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}.")
    if dtype not in choices:
        raise ValueError(f"dtype must be {' or '.join(map(dtype_name, choices))}, got {dtype_name(dtype)}.")


def _empty_like_quantized(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:2], dtype=torch.float32)


_quantize_kv_op = torch.library.custom_op("pagedkv::quantize_kv", _quantize_kv, mutates_args=())


@_quantize_kv_op.register_fake
def _quantize_kv_shape(x: torch.Tensor, dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like_quantized(x, dtype)


_dequantize_kv_op = torch.library.custom_op("pagedkv::dequantize_kv", _dequantize_kv, mutates_args=())


@_dequantize_kv_op.register_fake
def _dequantize_kv_shape(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.new_empty(values.shape, dtype=dtype)
