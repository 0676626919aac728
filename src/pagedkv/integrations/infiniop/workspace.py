"""Memory that a call borrows from its caller: what lies where in one buffer of bytes."""

from __future__ import annotations

import math

import torch

from ...shapes import dtype_name
from .status import InfiniopError, InfiniStatus
from .tensor_memory import address_of, check_dense

__all__ = ["WorkspaceLayout"]

_ALIGNMENT = 16


class WorkspaceLayout:
    """Tensors that are laid out one after the other; `num_bytes` is what all of them take."""

    __slots__ = ("_parts", "num_bytes")

    def __init__(self, *parts: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._parts: list[tuple[int, int, tuple[int, ...], torch.dtype]] = []
        self.num_bytes = 0
        for shape, dtype in parts:
            size = math.prod(shape) * dtype.itemsize
            self._parts.append((self.num_bytes, size, shape, dtype))
            self.num_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def carve(self, workspace: torch.Tensor | None, device: torch.device) -> list[torch.Tensor]:
        """Views into the workspace, one a part; None is enough where nothing is needed.

        Raises: InfiniopError: INSUFFICIENT_WORKSPACE for one that is missing or too small; BAD_TENSOR_DTYPE,
                BAD_TENSOR_SHAPE, BAD_TENSOR_STRIDES, BAD_PARAM for one that is no plain aligned buffer of bytes there.
        """
        if workspace is not None:
            self._check(workspace, device)
        if (0 if workspace is None else workspace.numel()) < self.num_bytes:
            got = "None" if workspace is None else str(workspace.numel())
            raise InfiniopError(
                InfiniStatus.INSUFFICIENT_WORKSPACE,
                f"workspace must hold {self.num_bytes} bytes, got {got}. Ask the descriptor for workspace_size.",
            )
        if workspace is None:
            return []
        return [workspace[start : start + size].view(dtype).view(shape) for start, size, shape, dtype in self._parts]

    def _check(self, workspace: torch.Tensor, device: torch.device) -> None:
        check_dense("workspace", workspace)
        if workspace.dtype != torch.uint8:
            raise InfiniopError(
                InfiniStatus.BAD_TENSOR_DTYPE, f"workspace must have dtype uint8, got {dtype_name(workspace.dtype)}."
            )
        if workspace.dim() != 1:
            raise InfiniopError(
                InfiniStatus.BAD_TENSOR_SHAPE, f"workspace must have shape [bytes], got {list(workspace.shape)}."
            )
        if not workspace.is_contiguous():
            raise InfiniopError(
                InfiniStatus.BAD_TENSOR_STRIDES, f"workspace must be contiguous, got stride {workspace.stride(0)}."
            )
        if workspace.device != device:
            raise InfiniopError(
                InfiniStatus.BAD_PARAM, f"workspace must be on {device} like the handle, got {workspace.device}."
            )
        address = address_of("workspace", workspace)
        if self._parts and (address % _ALIGNMENT or workspace.storage_offset() % _ALIGNMENT):
            raise InfiniopError(
                InfiniStatus.BAD_PARAM,
                f"workspace must be aligned to {_ALIGNMENT} bytes, got address {address:#x}.",
            )
