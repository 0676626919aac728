"""Checks of what operators are created for: nulls, dtypes, shapes and strides, each with its own status."""

from __future__ import annotations

import torch

from ...kernels.backend import OpCall, select
from ...shapes import dtype_name
from .handle import Handle
from .status import InfiniopError, InfiniStatus, as_infiniop_errors
from .tensor_descriptor import TensorDescriptor, TensorLike
from .tensor_memory import check_dense

__all__ = [
    "FLOATING",
    "INDEX_DTYPES",
    "Sizes",
    "check_contiguous_rows",
    "check_dtype",
    "check_handle",
    "check_runs",
    "check_scales",
    "check_writable",
    "described",
    "described_or_none",
]

FLOATING = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64, torch.uint32)


def described(handle: Handle, name: str, tensor: TensorLike | None) -> TensorDescriptor:
    """The descriptor of a tensor that must be there; raises with NULL_POINTER or BAD_PARAM."""
    if tensor is None:
        raise InfiniopError(InfiniStatus.NULL_POINTER, f"{name} must be a tensor or its descriptor, got None.")
    if isinstance(tensor, TensorDescriptor):
        return tensor
    if not isinstance(tensor, torch.Tensor):
        raise InfiniopError(
            InfiniStatus.BAD_PARAM, f"{name} must be a tensor or its descriptor, got {type(tensor).__name__}."
        )
    check_dense(name, tensor)
    if tensor.device != handle.device:
        raise InfiniopError(
            InfiniStatus.BAD_PARAM, f"{name} must be on {handle.device} like the handle, got {tensor.device}."
        )
    return TensorDescriptor.of(tensor)


def described_or_none(handle: Handle, name: str, tensor: TensorLike | None) -> TensorDescriptor | None:
    """The same of a tensor that may be left out."""
    return None if tensor is None else described(handle, name, tensor)


class Sizes:
    """Binds each symbol of a shape to the first size it meets, and refuses others with BAD_TENSOR_SHAPE."""

    __slots__ = ("_bound",)

    def __init__(self) -> None:
        self._bound: dict[str, tuple[int, str]] = {}

    def __getitem__(self, symbol: str) -> int:
        return self._bound[symbol][0]

    def check(self, name: str, given: TensorDescriptor, pattern: str) -> None:
        """Checks a shape against symbols with spaces between; "Dv+" is at least Dv."""
        symbols = pattern.split()
        right = len(symbols) == len(given.shape)
        if right:
            for symbol, size in zip(symbols, given.shape, strict=True):
                if symbol.endswith("+"):
                    right &= size >= self._bound[symbol[:-1]][0]
                else:
                    right &= self._bound.setdefault(symbol, (size, name))[0] == size
        if not right:
            raise InfiniopError(InfiniStatus.BAD_TENSOR_SHAPE, self._message(name, symbols, given))

    def _message(self, name: str, symbols: list[str], given: TensorDescriptor) -> str:
        known = [
            f"{symbol} = {self._bound[symbol][0]} (set by {self._bound[symbol][1]})"
            for symbol in dict.fromkeys(symbol.rstrip("+") for symbol in symbols)
            if symbol in self._bound and self._bound[symbol][1] != name
        ]
        with_known = f" with {', '.join(known)}" if known else ""
        written = ", ".join(f">= {symbol[:-1]}" if symbol.endswith("+") else symbol for symbol in symbols)
        return f"{name} must have shape [{written}]{with_known}, got {list(given.shape)}."


def check_handle(handle: object) -> None:
    """Refuses, with NULL_POINTER or BAD_PARAM, what is no handle."""
    if not isinstance(handle, Handle):
        status = InfiniStatus.NULL_POINTER if handle is None else InfiniStatus.BAD_PARAM
        raise InfiniopError(status, f"handle must be a Handle, got {type(handle).__name__}.")


def check_dtype(name: str, given: TensorDescriptor, *allowed: torch.dtype, like: str = "") -> None:
    """Refuses other dtypes with BAD_TENSOR_DTYPE."""
    if given.dtype not in allowed:
        rule = " or ".join(map(dtype_name, allowed)) + (f" like {like}" if like else "")
        raise InfiniopError(
            InfiniStatus.BAD_TENSOR_DTYPE, f"{name} must have dtype {rule}, got {dtype_name(given.dtype)}."
        )


def check_scales(
    sizes: Sizes,
    cache_dtype: torch.dtype,
    pattern: str,
    k_scale: TensorDescriptor | None,
    v_scale: TensorDescriptor | None,
) -> None:
    """Scales are there if caches are float8, and only then: BAD_PARAM both ways."""
    needed = cache_dtype == torch.float8_e4m3fn
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if needed != (scale is not None):
            rule = "be given for" if needed else "be None for"
            got = "None" if scale is None else "a tensor"
            raise InfiniopError(
                InfiniStatus.BAD_PARAM, f"{name} must {rule} {dtype_name(cache_dtype)} caches, got {got}."
            )
        if scale is not None:
            check_dtype(name, scale, torch.float32)
            sizes.check(name, scale, pattern)


def check_writable(name: str, given: TensorDescriptor | None) -> None:
    """Refuses, with BAD_TENSOR_STRIDES, a result two of whose elements would be one place in memory."""
    if given is not None and given.may_overlap_itself:
        raise InfiniopError(
            InfiniStatus.BAD_TENSOR_STRIDES,
            f"{name} must not overlap itself, got strides {list(given.strides)} of {list(given.shape)}.",
        )


def check_contiguous_rows(name: str, given: TensorDescriptor) -> None:
    """Refuses a strided last dim with BAD_TENSOR_STRIDES."""
    if not given.has_contiguous_rows:
        raise InfiniopError(
            InfiniStatus.BAD_TENSOR_STRIDES,
            f"{name} must have a contiguous last dimension (stride 1), got stride {given.strides[-1]}.",
        )


def check_runs(handle: Handle, *calls: OpCall) -> None:
    """Refuses, with DEVICE_TYPE_NOT_SUPPORTED, what the handle's back end cannot run."""
    if handle.device.type == "meta":
        raise InfiniopError(
            InfiniStatus.DEVICE_TYPE_NOT_SUPPORTED, "handle must be of a device whose tensors have memory, got meta."
        )
    with as_infiniop_errors():
        for call in calls:
            select(call, handle.backend)
