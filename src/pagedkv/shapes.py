"""Checks of the public boundary: shape symbols bound once a call, dtypes, devices, integers.

The letters are those of the docstrings: S num_seqs, T num_tokens, N num_pages, P page_size, Hq num_q_heads,
Hk num_kv_heads, D head_dim, Dv value_dim, L num_layers, M max pages a sequence.

>>> shapes = Shapes()
>>> shapes.check("key", torch.zeros(128, 8, 64), "T Hk D")
>>> shapes.check("slot_mapping", torch.zeros(127), "T")
Traceback (most recent call last):
ValueError: slot_mapping must have shape [T] with T = 128 (set by key), got [127].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = [
    "QUANTISED_DTYPES",
    "Shapes",
    "check_choice",
    "check_device",
    "check_dtype",
    "check_floating",
    "check_int",
    "check_last_dim_contiguous",
    "dtype_name",
]

QUANTISED_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


class Shapes:
    """Binds each symbol to the first size it meets and refuses every later size that differs."""

    __slots__ = ("_bound",)

    def __init__(self, **known: int) -> None:
        self._bound: dict[str, tuple[int, str]] = {symbol: (size, "the call") for symbol, size in known.items()}

    def __getitem__(self, symbol: str) -> int:
        return self._bound[symbol][0]

    def bind(self, symbol: str, size: int, owner: str) -> None:
        """Binds `symbol` without a tensor, for example a page size that a page table carries."""
        self._bound[symbol] = (size, owner)

    def check(self, name: str, tensor: torch.Tensor, pattern: str) -> None:
        """Checks `tensor` against space-separated symbols or numbers; raises TypeError or ValueError, naming `name`."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        if tensor.layout is not torch.strided or tensor.is_nested:
            what = "a nested tensor" if tensor.is_nested else f"layout {str(tensor.layout).removeprefix('torch.')}"
            raise TypeError(f"{name} must be a dense tensor (layout strided), got {what}.")
        if not torch.compiler.is_compiling() and tensor.is_neg():
            raise ValueError(f"{name} must hold its values as they are, got a negated view. Pass {name}.resolve_neg().")
        symbols = pattern.split()
        if tensor.dim() != len(symbols):
            raise ValueError(self._message(name, symbols, tensor))
        for symbol, size in zip(symbols, tensor.shape, strict=True):
            if symbol.isdigit():
                if size != int(symbol):
                    raise ValueError(self._message(name, symbols, tensor))
                continue
            bound = self._bound.get(symbol)
            if bound is None:
                self._bound[symbol] = (size, name)
            elif bound[0] != size:
                raise ValueError(self._message(name, symbols, tensor))

    def _message(self, name: str, symbols: list[str], tensor: torch.Tensor) -> str:
        known = [
            f"{symbol} = {self._bound[symbol][0]} (set by {self._bound[symbol][1]})"
            for symbol in dict.fromkeys(symbols)
            if symbol in self._bound and self._bound[symbol][1] != name
        ]
        with_known = f" with {', '.join(known)}" if known else ""
        return f"{name} must have shape [{', '.join(symbols)}]{with_known}, got {list(tensor.shape)}."


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without the `torch.` in front."""
    return str(dtype).removeprefix("torch.")


def check_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype, remedy: str = "") -> None:
    """Refuses any dtype not in `allowed`; index tensors are never cast."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in allowed:
        names = " or ".join(dtype_name(dtype) for dtype in allowed)
        suffix = f" {remedy}" if remedy else ""
        raise TypeError(f"{name} must have dtype {names}, got {dtype_name(tensor.dtype)}.{suffix}")


def check_floating(name: str, tensor: torch.Tensor, *, quantised: bool = False) -> None:
    """Refuses everything but float32, float16 and bfloat16 and, where `quantised`, int8 and the two float8."""
    check_dtype(name, tensor, *_FLOATING, *(QUANTISED_DTYPES if quantised else ()))


def check_device(name: str, tensor: torch.Tensor, device: torch.device, owner: str) -> None:
    """Refuses a tensor on another device than that of the tensor called `owner`."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like {owner}, got {tensor.device}.")


def check_last_dim_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Refuses a strided last dimension; every other stride is honoured."""
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have a contiguous last dimension (stride 1), got stride {tensor.stride(-1)}.")


def check_int(name: str, value: object, minimum: int) -> None:
    """Refuses what is not an int (a bool is none) or is below `minimum`."""
    if type(value) is int and value >= minimum:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuses a value that is not one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}.")
