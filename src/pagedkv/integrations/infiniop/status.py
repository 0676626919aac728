"""The operator library's status codes, and the one exception that carries them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from ...errors import BackendUnavailableError, PagedKVError

__all__ = ["InfiniStatus", "InfiniopError", "as_infiniop_errors", "call_status"]


class InfiniStatus(IntEnum):
    """What a call came to; 9 is not in use."""

    SUCCESS = 0
    INTERNAL_ERROR = 1
    NOT_IMPLEMENTED = 2
    BAD_PARAM = 3
    NULL_POINTER = 4
    DEVICE_TYPE_NOT_SUPPORTED = 5
    DEVICE_NOT_FOUND = 6
    DEVICE_NOT_INITIALIZED = 7
    DEVICE_ARCHITECTURE_NOT_SUPPORTED = 8
    BAD_TENSOR_DTYPE = 10
    BAD_TENSOR_SHAPE = 11
    BAD_TENSOR_STRIDES = 12
    INSUFFICIENT_WORKSPACE = 13

    @property
    def description(self) -> str:
        """The string of the operator library, for example "Bad Tensor Shape"."""
        return _DESCRIPTIONS.get(self) or self.name.replace("_", " ").title()


_DESCRIPTIONS = {InfiniStatus.BAD_PARAM: "Bad Parameter", InfiniStatus.BAD_TENSOR_DTYPE: "Bad Tensor Data Type"}


class InfiniopError(PagedKVError, ValueError):
    """A call that failed and changed nothing: `status` is the code, the message names tensor, rule and what arrived."""

    def __init__(self, status: InfiniStatus, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(f"{message} ({status.description}, status {int(status)})")

    def __reduce__(self) -> tuple[type[InfiniopError], tuple[InfiniStatus, str]]:
        return type(self), (self.status, self.message)


@contextmanager
def as_infiniop_errors() -> Iterator[None]:
    """Within it, what an op of this library refuses comes up as BAD_PARAM, or DEVICE_TYPE_NOT_SUPPORTED."""
    try:
        yield
    except InfiniopError:
        raise
    except BackendUnavailableError as error:
        raise InfiniopError(InfiniStatus.DEVICE_TYPE_NOT_SUPPORTED, str(error)) from error
    except (ValueError, TypeError) as error:
        raise InfiniopError(InfiniStatus.BAD_PARAM, str(error)) from error


def call_status(function: Callable[..., object], *args: Any, **kwargs: Any) -> InfiniStatus:
    """Calls the function and returns a code instead of raising, for callers written for codes; its result is dropped.

    Anything but an InfiniopError is a defect and comes up as it is.

    >>> from pagedkv.integrations import infiniop
    >>> call_status(infiniop.paged_caching, None, None, None, None, None)
    <InfiniStatus.NULL_POINTER: 4>
    """
    try:
        function(*args, **kwargs)
    except InfiniopError as error:
        return error.status
    return InfiniStatus.SUCCESS
