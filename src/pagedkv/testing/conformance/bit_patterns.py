"""Elements of every kind of bits: a move that looks at numbers instead of bytes changes some of them."""

from __future__ import annotations

import math

import torch

__all__ = ["bit_patterns"]

# Bytes that make zeros, subnormals, infinities and NaN with payloads of every floating dtype here.
_EDGES = torch.tensor([0x00, 0x01, 0x7C, 0x7F, 0x80, 0x81, 0xFC, 0xFF], dtype=torch.uint8)


# A prime, so that no stride of pages or heads falls together with the repetition.
_NUM_DIFFERENT = 4099


def bit_patterns(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Half of the elements of any bits at all, the others of edge bytes, a tenth with the bits of -0.0."""
    bytes_shape = (_NUM_DIFFERENT, dtype.itemsize)
    kind = torch.rand(_NUM_DIFFERENT, 1)
    bits = torch.randint(256, bytes_shape, dtype=torch.uint8)
    bits = torch.where(kind < 0.5, _EDGES[torch.randint(len(_EDGES), bytes_shape)], bits)
    negative_zero = torch.zeros(dtype.itemsize, dtype=torch.uint8)
    negative_zero[-1] = 0x80
    patterns = torch.where(kind < 0.1, negative_zero, bits).view(dtype).squeeze(-1)
    num_elements = math.prod(shape)
    return patterns.repeat(-(-num_elements // _NUM_DIFFERENT))[:num_elements].view(shape)
