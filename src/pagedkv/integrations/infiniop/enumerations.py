"""The operator library's numbers of devices and dtypes, and what they are to torch."""

from __future__ import annotations

from enum import IntEnum

import torch

from ...shapes import dtype_name
from .status import InfiniopError, InfiniStatus

__all__ = ["InfiniDevice", "InfiniDtype"]


class InfiniDevice(IntEnum):
    """Makers of devices, as the operator library numbers them."""

    CPU = 0
    NVIDIA = 1
    CAMBRICON = 2
    ASCEND = 3
    METAX = 4
    MOORE = 5
    ILUVATAR = 6
    KUNLUN = 7
    HYGON = 8
    QY = 9
    ALI = 10

    @property
    def torch_type(self) -> str:
        """The type of a torch.device; raises with DEVICE_TYPE_NOT_SUPPORTED for devices that torch has no name for."""
        if self not in _TORCH_TYPES:
            raise InfiniopError(
                InfiniStatus.DEVICE_TYPE_NOT_SUPPORTED,
                f"device must be {', '.join(known.name for known in _TORCH_TYPES)}, got {self.name}. "
                "Pass the torch.device that its torch build uses.",
            )
        return _TORCH_TYPES[self]


_TORCH_TYPES = {
    InfiniDevice.CPU: "cpu",
    InfiniDevice.NVIDIA: "cuda",
    InfiniDevice.CAMBRICON: "mlu",
    InfiniDevice.ASCEND: "npu",
    InfiniDevice.MOORE: "musa",
}


class InfiniDtype(IntEnum):
    """Types of elements, as the operator library numbers them; F8 is float8_e4m3fn."""

    INVALID = 0
    BYTE = 1
    BOOL = 2
    I8 = 3
    I16 = 4
    I32 = 5
    I64 = 6
    U8 = 7
    U16 = 8
    U32 = 9
    U64 = 10
    F8 = 11
    F16 = 12
    F32 = 13
    F64 = 14
    C16 = 15
    C32 = 16
    C64 = 17
    C128 = 18
    BF16 = 19

    @property
    def torch_dtype(self) -> torch.dtype:
        """torch's dtype; raises with BAD_TENSOR_DTYPE for INVALID and C16, which torch does not have."""
        if self not in _TORCH_DTYPES:
            raise InfiniopError(InfiniStatus.BAD_TENSOR_DTYPE, f"dtype must be one that torch has, got {self.name}.")
        return _TORCH_DTYPES[self]

    @classmethod
    def of(cls, dtype: torch.dtype) -> InfiniDtype:
        """The number of torch's dtype: U8 for uint8; raises with BAD_TENSOR_DTYPE for those without one."""
        for number, known in _TORCH_DTYPES.items():
            if known == dtype and number != cls.BYTE:
                return number
        raise InfiniopError(
            InfiniStatus.BAD_TENSOR_DTYPE, f"dtype must be one of InfiniDtype, got {dtype_name(dtype)}."
        )


_TORCH_DTYPES = {
    InfiniDtype.BYTE: torch.uint8,
    InfiniDtype.BOOL: torch.bool,
    InfiniDtype.I8: torch.int8,
    InfiniDtype.I16: torch.int16,
    InfiniDtype.I32: torch.int32,
    InfiniDtype.I64: torch.int64,
    InfiniDtype.U8: torch.uint8,
    InfiniDtype.U16: torch.uint16,
    InfiniDtype.U32: torch.uint32,
    InfiniDtype.U64: torch.uint64,
    InfiniDtype.F8: torch.float8_e4m3fn,
    InfiniDtype.F16: torch.float16,
    InfiniDtype.F32: torch.float32,
    InfiniDtype.F64: torch.float64,
    InfiniDtype.C32: torch.complex32,
    InfiniDtype.C64: torch.complex64,
    InfiniDtype.C128: torch.complex128,
    InfiniDtype.BF16: torch.bfloat16,
}
