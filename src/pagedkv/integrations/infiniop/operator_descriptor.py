"""What all operators share: created and checked once, run many times, destroyed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, TypeVar

import torch

from .between_graphs import runs_between_graphs
from .handle import Handle
from .status import InfiniopError, InfiniStatus, as_infiniop_errors
from .tensor_descriptor import TensorDescriptor
from .tensor_memory import Footprint, address_of, check_dense, may_share_memory
from .workspace import WorkspaceLayout

__all__ = ["OperatorDescriptor"]

_Descriptor = TypeVar("_Descriptor", bound="OperatorDescriptor")


_Pair = tuple[int, int]


class OperatorDescriptor(ABC):
    """One operator for tensors of given shapes, strides and dtypes; made by `create`, keeps no tensor.

    results: names of the tensors that are written.
    movable: names of those that may lie in the results, since they count as they were before the call.
    As a context manager it is destroyed at the end. It may be shared by threads that bring their own workspaces.
    """

    def __init__(
        self,
        handle: Handle,
        tensors: dict[str, TensorDescriptor | None],
        workspace: WorkspaceLayout,
        *,
        results: Sequence[str],
        movable: Sequence[str] = (),
    ) -> None:
        self.handle = handle
        self._tensors = tensors
        self._workspace = workspace
        self._is_destroyed = False
        self._footprints = [Footprint((), 0) if given is None else given.footprint for given in tensors.values()]
        names = list(tensors)
        self._results = [names.index(name) for name in results]
        self._apart = self._pairs_to_keep_apart(names, results, movable)
        self._known: dict[_Pair, int] = {}  # the distance at which a pair was last seen not to share memory

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

    @runs_between_graphs
    def _calculate(
        self, workspace: torch.Tensor | None, tensors: tuple[torch.Tensor | None, ...], stream: object
    ) -> None:
        """Runs on tensors in the order of `create`; checks all but values first."""
        self._check_alive()
        addresses = self._checked_addresses(tensors)
        parts = self._workspace.carve(workspace, self.handle.device)
        self._check_workspace_is_apart(workspace, addresses)
        self._check_results_are_apart(addresses)
        with self.handle.on_stream(stream), self._mode(workspace, tensors), as_infiniop_errors():
            self._run(parts, *tensors)

    @abstractmethod
    def _run(self, parts: list[torch.Tensor], *tensors: Any) -> None:
        """What the operator does with checked tensors and the parts of the workspace."""

    def _checked_addresses(self, tensors: tuple[torch.Tensor | None, ...]) -> list[int]:
        device = self.handle.device
        addresses = []
        for (name, expected), tensor in zip(self._tensors.items(), tensors, strict=True):
            if tensor is None:
                if expected is not None:
                    raise InfiniopError(InfiniStatus.NULL_POINTER, f"{name} must be a tensor as created, got None.")
                addresses.append(0)
                continue
            if (
                not isinstance(tensor, torch.Tensor)
                or expected is None
                or tensor.device != device
                or not expected.fits(tensor)
                or tensor.is_neg()
                or (tensor.requires_grad and torch.is_grad_enabled())
            ):
                raise InfiniopError(*_difference(name, expected, tensor, device))
            addresses.append(address_of(name, tensor))
        return addresses

    def _mode(
        self, workspace: torch.Tensor | None, tensors: tuple[torch.Tensor | None, ...]
    ) -> AbstractContextManager[object]:
        """What a call writes in: tensors of inference mode can be written there alone, all others anywhere."""
        if not torch.is_inference_mode_enabled():
            for written in (workspace, *[tensors[result] for result in self._results]):
                if written is not None and written.is_inference():
                    return torch.inference_mode()
        return nullcontext()

    def _pairs_to_keep_apart(self, names: list[str], results: Sequence[str], movable: Sequence[str]) -> list[_Pair]:
        """Each result with what else must not change when it is written."""
        pairs = []
        for one in self._results:
            for other, name in enumerate(names):
                is_new = name not in movable if name not in results else other > one
                if is_new and self._footprints[one].num_bytes and self._footprints[other].num_bytes:
                    pairs.append((one, other))
        return pairs

    def _check_results_are_apart(self, addresses: list[int]) -> None:
        footprints = self._footprints
        for pair in self._apart:
            one, other = pair
            distance = addresses[other] - addresses[one]
            if distance >= footprints[one].num_bytes or -distance >= footprints[other].num_bytes:
                continue
            if self._known.get(pair) == distance:  # views of one pool, layer after layer
                continue
            if may_share_memory(footprints[one], footprints[other], distance):
                names = list(self._tensors)
                raise InfiniopError(InfiniStatus.BAD_PARAM, _overlap(names[one], names[other]))
            self._known[pair] = distance

    def _check_workspace_is_apart(self, workspace: torch.Tensor | None, addresses: list[int]) -> None:
        num_bytes = self._workspace.num_bytes
        if workspace is None or not num_bytes:
            return
        start = workspace.data_ptr()
        for name, address, footprint in zip(self._tensors, addresses, self._footprints, strict=True):
            if address < start + num_bytes and start < address + footprint.num_bytes:
                raise InfiniopError(InfiniStatus.BAD_PARAM, _overlap("workspace", name))

    def _check_alive(self) -> None:
        if self._is_destroyed:
            raise InfiniopError(
                InfiniStatus.BAD_PARAM, f"{type(self).__name__} must not be destroyed, got one that is. Create another."
            )


def _difference(
    name: str, expected: TensorDescriptor | None, tensor: object, device: torch.device
) -> tuple[InfiniStatus, str]:
    """In what a tensor is not as described, with the status of that."""
    check_dense(name, tensor)
    assert isinstance(tensor, torch.Tensor)  # or it would not be dense
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


def _overlap(result: str, other: str) -> str:
    return f"{result} must not overlap {other}, got memory that both use. Pass a tensor of its own."
