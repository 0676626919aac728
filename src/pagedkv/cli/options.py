"""Choices that several commands offer, as the enumerations typer shows in --help."""

from __future__ import annotations

from enum import Enum

import torch

__all__ = ["KVDtype"]


class KVDtype(str, Enum):
    """The dtype of keys and values; `auto` is the dtype of the model, int8 and float8 are quantised."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype, None for `auto`."""
        if self is KVDtype.AUTO:
            return None
        dtype: torch.dtype = getattr(torch, self.value)
        return dtype
