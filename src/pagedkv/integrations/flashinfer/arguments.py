"""FlashInfer's ways of naming dtypes, modes, buffers and scales, turned into ours or refused."""

from __future__ import annotations

import torch

from ...kernels.attention_checks import check_no_overlap
from ...kernels.pages import check_no_grad, check_writable
from ...shapes import dtype_name

__all__ = [
    "Dtype",
    "Result",
    "Scale",
    "as_scalar",
    "canonical_dtype",
    "check_backend",
    "check_pos_encoding_mode",
    "check_result_buffer",
    "check_workspace",
    "int32_indices",
    "refuse",
]

Dtype = str | torch.dtype
Scale = float | torch.Tensor | None
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # output, or output and LSE

_POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")
# Names of their kernels for one card or another: here one kernel computes what all of them do.
_BACKENDS = ("auto", "fa2", "fa3")
_ALIGNMENT = 16


def canonical_dtype(name: str, dtype: str | torch.dtype) -> torch.dtype:
    """torch's dtype of a name like "float16"; a torch.dtype is itself."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or its name, got {dtype!r}.")
    return found


def check_pos_encoding_mode(mode: str) -> str:
    """KeyError for an unknown one, as FlashInfer raises it."""
    if mode not in _POS_ENCODING_MODES:
        raise KeyError(f"pos_encoding_mode must be one of {', '.join(_POS_ENCODING_MODES)}, got {mode!r}.")
    return mode


def check_backend(backend: str) -> None:
    """The names of kernels that run on any card are taken; one runs for all of them."""
    if backend not in _BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}: kernels of one vendor's libraries "
            "are not part of this module."
        )


def check_workspace(buffer: torch.Tensor | None, name: str = "float_workspace_buffer") -> None:
    """Any dtype and size, 16-byte aligned; None is taken, since results wait in memory of our own."""
    if buffer is None:
        return
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(buffer).__name__}.")
    if buffer.data_ptr() % _ALIGNMENT:
        raise ValueError(f"{name} must be aligned to {_ALIGNMENT} bytes, got address {buffer.data_ptr():#x}.")


def int32_indices(name: str, indices: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Index tensors may be int32 or int64, on the host or on the device; an id beyond int32 is refused, never cut.

    Returns: the tensor itself where it is what is asked for already.
    """
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(indices).__name__}.")
    if indices.dtype != torch.int32:
        if indices.dtype != torch.int64:
            raise ValueError(f"{name} must have dtype int32 or int64, got {dtype_name(indices.dtype)}.")
        if indices.numel() and (int(indices.max()) > 2**31 - 1 or int(indices.min()) < -(2**31)):
            raise ValueError(f"{name} must hold numbers of 32 bits, got {int(indices.abs().max())}.")
        indices = indices.to(torch.int32)
    return indices if device is None or indices.device == device else indices.to(device)


def as_scalar(name: str, value: float | torch.Tensor | None) -> float:
    """A factor given as a number or a tensor of one element; 1 for None."""
    if value is None:
        return 1.0
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element, got shape {list(value.shape)}.")
        return float(value.item())
    return float(value)


def check_result_buffer(
    name: str,
    buffer: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    **inputs: torch.Tensor | None,
) -> None:
    """What is written in place must be what would have been made, and lie in memory of its own.

    inputs: tensors that it must not overlap, by name.
    Raises: ValueError, as FlashInfer raises it.
    """
    if tuple(buffer.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(buffer.shape)}.")
    if buffer.dtype != dtype:
        raise ValueError(f"{name} must have dtype {dtype_name(dtype)}, got {dtype_name(buffer.dtype)}.")
    if buffer.device != device:
        raise ValueError(f"{name} must be on {device}, got {buffer.device}.")
    check_writable(name, buffer)
    if torch.is_grad_enabled():
        check_no_grad(**{name: buffer})
    if not torch.compiler.is_compiling():
        check_no_overlap(name, buffer, **inputs)


def refuse(**given: object) -> None:
    """Names an argument that asks for what is not here; None asks for nothing.

    Raises: NotImplementedError.
    """
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported by pagedkv.integrations.flashinfer. Leave it out.")
