"""Where operators run: the device, the back end and the stream of a call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from .enumerations import InfiniDevice
from .status import InfiniopError, InfiniStatus
from .tensor_memory import check_dense

__all__ = ["Handle", "handle_of"]


class Handle:
    """A device and the name of a back end of `pagedkv.backends()`, or "auto".

    device: a torch.device, its name, or an InfiniDevice; without an index the current one of its type.
    Raises: InfiniopError: DEVICE_TYPE_NOT_SUPPORTED for a type that this torch does not know, DEVICE_NOT_FOUND for a
            device that is not there, BAD_PARAM for a back end that is no name.

    >>> Handle(InfiniDevice.CPU)
    Handle(device='cpu', backend='auto')
    """

    __slots__ = ("backend", "device")

    def __init__(self, device: torch.device | str | InfiniDevice = "cpu", backend: str = "auto") -> None:
        _check_backend(backend)
        self.device = _found(device)
        self.backend = backend

    def on_stream(self, stream: Any) -> AbstractContextManager[object]:
        """What a call runs in. None: the current stream; 0: the default stream; on a CPU there is nothing else."""
        if stream is None or (stream == 0 and type(stream) is int and self.device.type == "cpu"):
            return nullcontext()
        if self.device.type == "cuda":
            if type(stream) is int and stream == 0:
                stream = torch.cuda.default_stream(self.device)
            if isinstance(stream, torch.cuda.Stream) and stream.device == self.device:
                return torch.cuda.stream(stream)
            rule = f"None, 0 or a torch.cuda.Stream of {self.device}"
        elif self.device.type == "cpu":
            rule = "None or 0 on a CPU"
        else:
            if isinstance(stream, torch.Stream) and stream.device == self.device:
                return stream
            rule = f"None or a torch.Stream of {self.device}"
        raise InfiniopError(InfiniStatus.BAD_PARAM, f"stream must be {rule}, got {stream!r}.")

    def __repr__(self) -> str:
        return f"Handle(device={str(self.device)!r}, backend={self.backend!r})"


def handle_of(name: str, tensor: object, backend: str) -> Handle:
    """The handle of a tensor's device; raises with NULL_POINTER or BAD_PARAM for what is no dense tensor."""
    check_dense(name, tensor)
    assert isinstance(tensor, torch.Tensor)  # or it would not be dense
    _check_backend(backend)
    return _handle(tensor.device, backend)


_handle = lru_cache(maxsize=64)(Handle)


def _check_backend(backend: object) -> None:
    if not isinstance(backend, str):
        raise InfiniopError(
            InfiniStatus.BAD_PARAM,
            f"backend must be 'auto' or a name of pagedkv.backends(), got {type(backend).__name__}.",
        )


def _found(device: object) -> torch.device:
    name = device.torch_type if isinstance(device, InfiniDevice) else device
    try:
        # torch takes a number to be an index, the operator library a type: neither is meant for sure.
        found = torch.device(name) if isinstance(name, str | torch.device) else None
    except RuntimeError:
        found = None
    if found is None:
        raise InfiniopError(
            InfiniStatus.DEVICE_TYPE_NOT_SUPPORTED,
            f"device must be an InfiniDevice or one that this torch knows by name, got {device!r}.",
        )
    return found if found.type == "meta" else _present(found)


def _present(device: torch.device) -> torch.device:
    """The device as tensors on it name theirs."""
    try:
        module = torch.get_device_module(device)
        num_devices = module.device_count()
    except RuntimeError:  # a type that this build has no part for
        num_devices = 0
    index: int | None = device.index
    if (index or 0) >= num_devices:
        raise InfiniopError(
            InfiniStatus.DEVICE_NOT_FOUND,
            f"device must be one of {num_devices} {device.type} devices, got {str(device)!r}.",
        )
    if device.type == "cpu":
        return torch.device("cpu")
    if index is None:
        return torch.device(device.type, module.current_device() if hasattr(module, "current_device") else 0)
    return device
