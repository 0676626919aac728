"""What an operator is created for: shape, strides and dtype of a tensor, without its data."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ...kernels.pages import may_overlap_itself
from .enumerations import InfiniDtype
from .status import InfiniopError, InfiniStatus
from .tensor_memory import Footprint, check_dense

__all__ = ["TensorDescriptor", "TensorLike"]

_STRIDED = torch.strided
_MOST_DIMS = 64
_END = 2**63


@dataclass(frozen=True)
class TensorDescriptor:
    """Shape, strides in elements and dtype (torch's, or an InfiniDtype, which becomes torch's).

    footprint: the bytes that such a tensor uses.
    Raises: InfiniopError: BAD_TENSOR_SHAPE, BAD_TENSOR_STRIDES, BAD_TENSOR_DTYPE for what no torch tensor can have.

    >>> TensorDescriptor.of(torch.zeros(4, 2, 8).transpose(0, 1))
    TensorDescriptor(shape=(2, 4, 8), strides=(8, 16, 1), dtype=torch.float32)
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    footprint: Footprint = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape = _numbers("shape", self.shape, InfiniStatus.BAD_TENSOR_SHAPE)
        strides = _numbers("strides", self.strides, InfiniStatus.BAD_TENSOR_STRIDES)
        dtype = self.dtype.torch_dtype if isinstance(self.dtype, InfiniDtype) else self.dtype
        for name, value in (("shape", shape), ("strides", strides), ("dtype", dtype)):
            object.__setattr__(self, name, value)
        if len(strides) != len(shape):
            raise InfiniopError(
                InfiniStatus.BAD_TENSOR_STRIDES,
                f"strides must be {len(shape)} numbers (one a dim), got {list(strides)}.",
            )
        if not isinstance(dtype, torch.dtype):
            raise InfiniopError(
                InfiniStatus.BAD_TENSOR_DTYPE,
                f"dtype must be a torch.dtype or an InfiniDtype, got {type(dtype).__name__}.",
            )
        if math.prod(shape) * dtype.itemsize >= _END:
            raise InfiniopError(
                InfiniStatus.BAD_TENSOR_SHAPE, f"shape must be of less than 2**63 bytes, got {list(shape)}."
            )
        object.__setattr__(self, "footprint", Footprint.of(shape, strides, dtype.itemsize))
        if self.footprint.num_bytes >= _END:
            raise InfiniopError(
                InfiniStatus.BAD_TENSOR_STRIDES,
                f"strides must reach less than 2**63 bytes, got {list(strides)} of {list(shape)}.",
            )

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str = "tensor") -> TensorDescriptor:
        """That of a tensor, which it does not keep; refuses one without strides, calling it by the name."""
        check_dense(name, tensor)
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @property
    def has_contiguous_rows(self) -> bool:
        """Whether the elements of the last dim lie side by side."""
        return not self.shape or self.shape[-1] <= 1 or 0 in self.shape or self.strides[-1] == 1

    @property
    def may_overlap_itself(self) -> bool:
        """Whether two of its elements may be one place in memory: an expanded tensor, or strides that do not nest."""
        return may_overlap_itself(self.shape, self.strides)

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is as described; strides that never move anywhere may be anything."""
        if tensor.is_nested or tensor.layout is not _STRIDED:
            return False
        if tensor.dtype != self.dtype or tensor.shape != self.shape:
            return False
        strides = tensor.stride()
        return (
            strides == self.strides
            or 0 in self.shape
            or all(size == 1 or mine == its for size, mine, its in zip(self.shape, self.strides, strides, strict=True))
        )


TensorLike = TensorDescriptor | torch.Tensor


def _numbers(name: str, given: Iterable[int], status: InfiniStatus) -> tuple[int, ...]:
    """Sizes or strides as plain ints."""
    try:
        numbers = tuple(given)
        is_right = bool not in map(type, numbers)
        numbers = tuple(map(operator.index, numbers))
    except TypeError:
        is_right = False
    if not is_right:
        raise InfiniopError(status, f"{name} must be a sequence of ints, got {given!r}.")
    if len(numbers) > _MOST_DIMS:
        raise InfiniopError(status, f"{name} must have at most {_MOST_DIMS} dims, got {len(numbers)}.")
    if numbers and (min(numbers) < 0 or max(numbers) >= _END):
        raise InfiniopError(status, f"{name} must be 0 or more and below 2**63, got {list(numbers)}.")
    return numbers
