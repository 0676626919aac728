"""Where operators run: the device, the back end and the stream of a call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from .enumerations import InfiniDevice
from .status import InfiniopError, InfiniStatus

__all__ = ["Handle", "handle_of"]


class Handle:
    """A device and the name of a back end of `pagedkv.backends()`, or "auto".

    device: a torch.device, its name, or an InfiniDevice.
    Raises: InfiniopError: DEVICE_TYPE_NOT_SUPPORTED for a type that this torch does not know, DEVICE_NOT_FOUND for a
            device that is not there.

    >>> Handle(InfiniDevice.CPU)
    Handle(device='cpu', backend='auto')
    """

    __slots__ = ("backend", "device")

    def __init__(self, device: torch.device | str | InfiniDevice = "cpu", backend: str = "auto") -> None:
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
    """The handle of a tensor's device; raises with NULL_POINTER or BAD_PARAM for what is no tensor."""
    if not isinstance(tensor, torch.Tensor):
        status = InfiniStatus.NULL_POINTER if tensor is None else InfiniStatus.BAD_PARAM
        raise InfiniopError(status, f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    return _handle(tensor.device, backend)


_handle = lru_cache(maxsize=64)(Handle)


def _found(device: torch.device | str | InfiniDevice) -> torch.device:
    name = device.torch_type if isinstance(device, InfiniDevice) else device
    try:
        found = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InfiniopError(
            InfiniStatus.DEVICE_TYPE_NOT_SUPPORTED,
            f"device must be one that this torch knows, got {device!r}.",
        ) from error
    if found.type == "cuda":
        index: int | None = found.index
        num_devices = torch.cuda.device_count()
        if (index or 0) >= num_devices:
            raise InfiniopError(
                InfiniStatus.DEVICE_NOT_FOUND, f"device must be one of {num_devices} CUDA devices, got {str(found)!r}."
            )
        if index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return found
