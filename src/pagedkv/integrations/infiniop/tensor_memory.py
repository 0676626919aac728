"""Where in memory tensors lie: whether they have any, and whether two of them use the same."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...kernels.pages import memory_address
from .status import InfiniopError, InfiniStatus

__all__ = ["Footprint", "address_of", "check_dense", "is_dense", "may_share_memory"]


class Footprint(NamedTuple):
    """The bytes that a tensor uses, from its address on.

    steps:     (bytes, times) of each dim, the widest first, the bytes of an element the last.
    num_bytes: from the first to the last of them, those between included; 0 without elements.
    """

    steps: tuple[tuple[int, int], ...]
    num_bytes: int

    @classmethod
    def of(cls, shape: tuple[int, ...], strides: tuple[int, ...], element_size: int) -> Footprint:
        """That of all tensors of this metadata; strides in elements."""
        if 0 in shape:
            return cls((), 0)
        steps = [(stride * element_size, size) for stride, size in zip(strides, shape, strict=True)]
        steps.append((1, element_size))
        steps = sorted([(step, times) for step, times in steps if step and times > 1], reverse=True)
        return cls(tuple(steps), _reach(steps))


def may_share_memory(one: Footprint, other: Footprint, distance: int) -> bool:
    """Whether two tensors use a byte in common, the address of `other` lying `distance` behind that of `one`.

    Exact as far as their steps are the same, as those of views of one pool are; below that, ranges must not cross.
    """
    if not one.num_bytes or not other.num_bytes:
        return False
    return _meet(one.steps, other.steps, distance)


def _meet(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...], distance: int) -> bool:
    if distance >= _reach(one) or -distance >= _reach(other):
        return False
    if not one or not other or one[0][0] != other[0][0]:
        return True
    (step, times), (_, other_times) = one[0], other[0]
    # An item of the other lies a number of steps from one of this; only where their ranges cross can they meet.
    lowest = max(1 - times, -((_reach(other[1:]) - 1 + distance) // step))
    highest = min(other_times - 1, (_reach(one[1:]) - 1 - distance) // step)
    return any(_meet(one[1:], other[1:], distance + apart * step) for apart in range(lowest, highest + 1))


def _reach(steps: tuple[tuple[int, int], ...] | list[tuple[int, int]]) -> int:
    return 1 + sum([step * (times - 1) for step, times in steps])


def is_dense(tensor: object) -> bool:
    """Whether it is a tensor with strides."""
    return isinstance(tensor, torch.Tensor) and not tensor.is_nested and tensor.layout is torch.strided


def check_dense(name: str, tensor: object) -> None:
    """Refuses None with NULL_POINTER and, with BAD_PARAM, what is no tensor, or one without strides."""
    if not isinstance(tensor, torch.Tensor):
        status = InfiniStatus.NULL_POINTER if tensor is None else InfiniStatus.BAD_PARAM
        raise InfiniopError(status, f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if not is_dense(tensor):
        what = "a nested tensor" if tensor.is_nested else f"layout {str(tensor.layout).removeprefix('torch.')}"
        raise InfiniopError(InfiniStatus.BAD_PARAM, f"{name} must be a dense tensor (layout strided), got {what}.")


def address_of(name: str, tensor: torch.Tensor) -> int:
    """The address of the first element; refuses, with BAD_PARAM, elements without memory, as fake tensors have."""
    address = memory_address(tensor)
    if not address and tensor.numel():
        raise InfiniopError(
            InfiniStatus.BAD_PARAM,
            f"{name} must have memory, got a {type(tensor).__name__} of {tensor.numel()} elements without.",
        )
    return address
