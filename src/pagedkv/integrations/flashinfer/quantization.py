"""Booleans as bits, eight a byte: the packed form of custom masks."""

from __future__ import annotations

import torch

from ...shapes import Shapes, check_choice, dtype_name
from .arguments import int32_indices

__all__ = ["packbits", "segment_packbits"]


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Eight entries a byte, [ceil(n / 8)] uint8; the last byte is filled up with zeros.

    Shapes: x of any shape, bool or uint8 (any number but 0 is a set bit), taken in row-major order.
    Rule:   the first entry of a byte is its highest bit ("big") or its lowest ("little"), as numpy.packbits has it.
    Raises: ValueError for another dtype or bitorder.

    >>> packbits(torch.tensor([True, False, True, True])).tolist()
    [176]
    """
    bits = _as_bits(x, bitorder)
    return _packed(torch.nn.functional.pad(bits, (0, -bits.shape[0] % 8)), bitorder)


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> tuple[torch.Tensor, torch.Tensor]:
    """`packbits` of each segment on its own: every segment starts with a byte.

    Shapes: x [indptr[-1]] bool or uint8; indptr [B + 1] int32 or int64.
    Returns: the bytes, uint8; and where each segment starts among them, [B + 1] int32.
    Raises: ValueError for another dtype, bitorder or shape, and for an indptr that does not start with 0 or decreases.

    >>> packed, starts = segment_packbits(torch.tensor([True, False, True]), torch.tensor([0, 1, 3]))
    >>> packed.tolist(), starts.tolist()
    ([128, 64], [0, 1, 2])
    """
    shapes = Shapes()
    shapes.check("x", x, "n")
    shapes.check("indptr", indptr, "B+1")
    bits = _as_bits(x, bitorder)
    starts = int32_indices("indptr", indptr).to(x.device, torch.int64)
    if not starts.shape[0] or int(starts[0]) != 0 or bool((starts[1:] < starts[:-1]).any()):
        raise ValueError(f"indptr must start with 0 and not decrease, got {starts.tolist()}.")
    if int(starts[-1]) != bits.shape[0]:
        raise ValueError(f"x must have indptr[-1] = {int(starts[-1])} entries, got {bits.shape[0]}.")
    num_bits = starts[1:] - starts[:-1]
    byte_starts = torch.nn.functional.pad(((num_bits + 7) // 8).cumsum(0), (1, 0))
    segments = torch.split(bits, num_bits.tolist())
    padded = torch.cat([bits[:0], *(torch.nn.functional.pad(part, (0, -part.shape[0] % 8)) for part in segments)])
    return _packed(padded, bitorder), byte_starts.to(indptr.device, torch.int32)


def _as_bits(x: torch.Tensor, bitorder: str) -> torch.Tensor:
    """[n] uint8 of 0 and 1."""
    check_choice("bitorder", bitorder, ("big", "little"))
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}.")
    if x.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"x must have dtype bool or uint8, got {dtype_name(x.dtype)}.")
    return x.reshape(-1).to(torch.bool).to(torch.uint8)


def _packed(bits: torch.Tensor, bitorder: str) -> torch.Tensor:
    """One byte for every eight entries, of which there are whole bytes."""
    packed = bits.new_zeros(bits.shape[0] // 8)
    for place, column in enumerate(bits.view(-1, 8).unbind(1)):
        packed |= column << (7 - place if bitorder == "big" else place)
    return packed
