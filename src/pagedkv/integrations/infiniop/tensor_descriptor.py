"""What an operator is created for: shape, strides and dtype of a tensor, without its data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .enumerations import InfiniDtype
from .status import InfiniopError, InfiniStatus

__all__ = ["TensorDescriptor", "TensorLike"]


@dataclass(frozen=True)
class TensorDescriptor:
    """Shape, strides in elements and dtype (torch's, or an InfiniDtype, which becomes torch's).

    Raises: InfiniopError: BAD_TENSOR_SHAPE, BAD_TENSOR_STRIDES, BAD_TENSOR_DTYPE for what no torch tensor can have.

    >>> TensorDescriptor.of(torch.zeros(4, 2, 8).transpose(0, 1))
    TensorDescriptor(shape=(2, 4, 8), strides=(8, 16, 1), dtype=torch.float32)
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("shape", "strides"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.dtype, InfiniDtype):
            object.__setattr__(self, "dtype", self.dtype.torch_dtype)
        if any(size < 0 for size in self.shape):
            raise InfiniopError(InfiniStatus.BAD_TENSOR_SHAPE, f"shape must be 0 or more, got {list(self.shape)}.")
        if len(self.strides) != len(self.shape) or any(stride < 0 for stride in self.strides):
            raise InfiniopError(
                InfiniStatus.BAD_TENSOR_STRIDES,
                f"strides must be {len(self.shape)} numbers of 0 or more (one a dim), got {list(self.strides)}.",
            )
        if not isinstance(self.dtype, torch.dtype):
            raise InfiniopError(
                InfiniStatus.BAD_TENSOR_DTYPE,
                f"dtype must be a torch.dtype or an InfiniDtype, got {type(self.dtype).__name__}.",
            )

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorDescriptor:
        """That of a tensor, which it does not keep."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @property
    def has_contiguous_rows(self) -> bool:
        """Whether the elements of the last dim lie side by side."""
        return not self.shape or self.shape[-1] <= 1 or 0 in self.shape or self.strides[-1] == 1

    @property
    def may_overlap_itself(self) -> bool:
        """Whether two of its elements may be one place in memory: an expanded tensor, or strides that do not nest."""
        if 0 in self.shape:
            return False
        reach = 0  # the farthest element of the dims so far
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1:
                if stride <= reach:
                    return True
                reach += (size - 1) * stride
        return False

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is as described; strides that never move anywhere may be anything."""
        if tensor.dtype != self.dtype or tensor.shape != self.shape:
            return False
        strides = tensor.stride()
        return (
            strides == self.strides
            or 0 in self.shape
            or all(size == 1 or mine == its for size, mine, its in zip(self.shape, self.strides, strides, strict=True))
        )


TensorLike = TensorDescriptor | torch.Tensor
