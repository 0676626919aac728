"""Choices that several commands offer, as the enumerations typer shows in --help."""

from __future__ import annotations

from enum import Enum

import torch

__all__ = ["KVDtype"]


class KVDtype(str, Enum):
    """The dtype of keys and values; `auto` is the dtype of the model."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype, None for `auto`."""
        dtypes = {self.FLOAT32: torch.float32, self.FLOAT16: torch.float16, self.BFLOAT16: torch.bfloat16}
        return dtypes.get(self)
