"""What all operators share: created and checked once, run many times, destroyed."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

import torch

from .handle import Handle
from .status import InfiniopError, InfiniStatus
from .tensor_descriptor import TensorDescriptor
from .workspace import WorkspaceLayout

__all__ = ["OperatorDescriptor"]

_Descriptor = TypeVar("_Descriptor", bound="OperatorDescriptor")


class OperatorDescriptor:
    """One operator for tensors of given shapes, strides and dtypes; made by `create`, keeps no tensor.

    As a context manager it is destroyed at the end. It may be shared by threads that bring their own workspaces.
    """

    def __init__(self, handle: Handle, tensors: dict[str, TensorDescriptor | None], workspace: WorkspaceLayout) -> None:
        self.handle = handle
        self._tensors = tensors
        self._workspace = workspace
        self._is_destroyed = False

    @property
    def workspace_size(self) -> int:
        """Bytes that each run needs; with 0 the workspace may be None."""
        self._check_alive()
        return self._workspace.num_bytes

    def get_workspace_size(self) -> int:
        """The same as a call."""
        return self.workspace_size

    def destroy(self) -> None:
        """Ends its use: whatever is called later fails with BAD_PARAM, but for another destroy."""
        self._is_destroyed = True

    def __enter__(self: _Descriptor) -> _Descriptor:
        self._check_alive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def _begin(self, workspace: torch.Tensor | None, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
        """Checks what a run was given, in the order of `create`; returns the parts of the workspace."""
        self._check_alive()
        device = self.handle.device
        for (name, expected), tensor in zip(self._tensors.items(), tensors, strict=True):
            if tensor is None:
                if expected is not None:
                    raise InfiniopError(InfiniStatus.NULL_POINTER, f"{name} must be a tensor as created, got None.")
            elif (
                not isinstance(tensor, torch.Tensor)
                or expected is None
                or tensor.device != device
                or not expected.fits(tensor)
                or tensor.is_neg()
                or (tensor.requires_grad and torch.is_grad_enabled())
            ):
                raise InfiniopError(*_difference(name, expected, tensor, device))
        return self._workspace.carve(workspace, device)

    def _check_alive(self) -> None:
        if self._is_destroyed:
            raise InfiniopError(
                InfiniStatus.BAD_PARAM, f"{type(self).__name__} must not be destroyed, got one that is. Create another."
            )


def _difference(
    name: str, expected: TensorDescriptor | None, tensor: object, device: torch.device
) -> tuple[InfiniStatus, str]:
    """In what a tensor is not as described, with the status of that."""
    if not isinstance(tensor, torch.Tensor):
        return InfiniStatus.BAD_PARAM, f"{name} must be a torch.Tensor, got {type(tensor).__name__}."
    if expected is None:
        return InfiniStatus.BAD_PARAM, f"{name} must be None as created, got a tensor."
    if tensor.device != device:
        return InfiniStatus.BAD_PARAM, f"{name} must be on {device} like the handle, got {tensor.device}."
    if tensor.dtype != expected.dtype:
        return InfiniStatus.BAD_TENSOR_DTYPE, f"{name} must have dtype {expected.dtype} as created, got {tensor.dtype}."
    if tensor.shape != expected.shape:
        return (
            InfiniStatus.BAD_TENSOR_SHAPE,
            f"{name} must have shape {list(expected.shape)} as created, got {list(tensor.shape)}.",
        )
    if not expected.fits(tensor):
        return (
            InfiniStatus.BAD_TENSOR_STRIDES,
            f"{name} must have strides {list(expected.strides)} as created, got {list(tensor.stride())}.",
        )
    if tensor.is_neg():
        return InfiniStatus.BAD_PARAM, f"{name} must hold its values as they are, got a negated view."
    return (
        InfiniStatus.BAD_PARAM,
        f"{name} must not require a gradient, got requires_grad=True. Call under torch.no_grad().",
    )
