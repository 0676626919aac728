"""Token ids as callers hold them, turned once into the one form that is stored and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from ..shapes import dtype_name

__all__ = ["DLPackTensor", "TokenArray", "TokenIds", "as_plain_token_array", "as_token_array", "as_token_ids"]


@runtime_checkable
class DLPackTensor(Protocol):
    """A tensor of any library that speaks DLPack."""

    def __dlpack__(self, *, stream: Any = ...) -> Any:
        """Its memory, as a capsule."""

    def __dlpack_device__(self) -> tuple[Any, int]:
        """Where it is; (1, 0) is the CPU."""


TokenArray = npt.NDArray[np.int64]
TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor | DLPackTensor


def as_token_ids(name: str, token_ids: TokenIds) -> TokenArray:
    """`token_ids` as a contiguous int64 array, which may be a view of the caller's: copy what is kept.

    Shapes: token_ids [n]: a list, tuple or range of ints, an int32 or int64 numpy array, or a tensor of torch or any
            library that speaks DLPack, on the CPU; no id below 0.
    Raises: TypeError, ValueError for anything else.
    """
    return np.ascontiguousarray(as_token_array(name, token_ids), dtype=np.int64)


def as_token_array(name: str, token_ids: TokenIds) -> npt.NDArray[Any]:
    """The same as int32 or int64, whichever the caller has: nothing is converted but lists."""
    # Arrays first: they are what hot paths have, and a look whether something is a torch.Tensor costs more.
    if isinstance(token_ids, np.ndarray):
        array: npt.NDArray[Any] = token_ids
    elif isinstance(token_ids, torch.Tensor):
        if token_ids.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {token_ids.device}.")
        if token_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must have dtype int32 or int64, got {dtype_name(token_ids.dtype)}.")
        array = token_ids.detach().numpy()
    elif isinstance(token_ids, (list, tuple, range)):
        array = _array_of_ints(name, token_ids)
    elif isinstance(token_ids, DLPackTensor):
        array = _array_of_tensor(name, token_ids)
    else:
        raise TypeError(
            f"{name} must be a list of ints, a numpy array or a torch tensor, got {type(token_ids).__name__}."
        )
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape [n], got {list(array.shape)}.")
    if array.dtype.kind != "i" or array.dtype.itemsize < 4:
        raise TypeError(f"{name} must have dtype int32 or int64, got {array.dtype.name}.")
    # The least by its position, which numpy finds without a detour through Python.
    if array.size and array.item(array.argmin()) < 0:
        position = int((array < 0).argmax())
        raise ValueError(f"{name} must be 0 or more, got {array[position]} at position {position}.")
    return np.ascontiguousarray(array)


def as_plain_token_array(name: str, token_ids: TokenIds) -> npt.NDArray[Any]:
    """The same in memory that native code reads as it lies: in the order of bytes of this machine, and aligned.

    A read-only array is copied too, because DLPack cannot say that it is.
    """
    array = as_token_array(name, token_ids)
    return np.require(array, array.dtype.newbyteorder("="), ["C", "A", "W"])


def _array_of_tensor(name: str, tensor: DLPackTensor) -> npt.NDArray[Any]:
    if int(tensor.__dlpack_device__()[0]) != 1:
        raise ValueError(f"{name} must be on the CPU, got a {type(tensor).__name__} on another device.")
    try:
        return np.from_dlpack(tensor)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name} must have dtype int32 or int64, got a {type(tensor).__name__}: {error}") from error


def _array_of_ints(name: str, token_ids: Sequence[int]) -> npt.NDArray[Any]:
    if not token_ids:
        return np.empty(0, np.int64)
    try:
        array = np.array(token_ids)
    except ValueError as error:
        raise TypeError(f"{name} must be a flat list of ints, got one of lists of different lengths.") from error
    if array.dtype.kind == "u" or (array.dtype.kind == "O" and all(isinstance(item, int) for item in token_ids)):
        raise ValueError(f"{name} must be below 2**63, got {max(token_ids)}.")
    if array.dtype.kind != "i":
        raise TypeError(f"{name} must be ints, got {_first_wrong(token_ids)}.")
    return array


def _first_wrong(token_ids: Sequence[object]) -> str:
    wrong = (item for item in token_ids if not isinstance(item, (int, np.integer)))
    return type(next(wrong, token_ids[0])).__name__
