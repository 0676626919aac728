"""flashinfer.utils: the small names that programs import from there."""

from __future__ import annotations

import enum
import math

import torch

from ...shapes import check_int
from .arguments import canonical_dtype
from .layouts import check_kv_layout, unpack_paged_kv_cache

__all__ = [
    "MaskMode",
    "PosEncodingMode",
    "TensorLayout",
    "canonicalize_torch_dtype",
    "get_alibi_slopes",
    "is_float8",
    "log2e",
]

# From a natural LSE to FlashInfer's, of base 2.
log2e = math.log2(math.e)

# Programs import these two under their private names.
_check_kv_layout = check_kv_layout
_unpack_paged_kv_cache = unpack_paged_kv_cache


class TensorLayout(enum.Enum):
    """Order of the dims of a page: tokens first, or heads first."""

    NHD = 0
    HND = 1


class PosEncodingMode(enum.Enum):
    """What attention does with positions: nothing, turn queries and keys, or add a slope."""

    NONE = 0
    ROPE_LLAMA = 1
    ALIBI = 2


class MaskMode(enum.Enum):
    """Which keys a row sees."""

    NON_CAUSAL = 0
    CAUSAL = 1
    CUSTOM = 2
    MULTIITEMSCORING = 3


def canonicalize_torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """torch's dtype of a name like "float16"; a torch.dtype is itself.

    Raises: TypeError for anything else.
    """
    return canonical_dtype("dtype", dtype)


def get_alibi_slopes(n_heads: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Slope of each head for attention with linear biases: float32 [n_heads].

    Rule:   with n the largest power of two up to n_heads, head i < n has 2 ** (-8 (i + 1) / n); head n + i has
            2 ** (-4 (2i + 1) / n). Computed in float64 and rounded once.
    Raises: ValueError, TypeError when n_heads is not an int of at least 1.
    Source: ALiBi (arXiv 2108.12409), section 3.

    >>> get_alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    check_int("n_heads", n_heads, minimum=1)
    n = 1 << (n_heads.bit_length() - 1)
    exponents = [-8 * (i + 1) / n for i in range(n)] + [-4 * (2 * i + 1) / n for i in range(n_heads - n)]
    return torch.tensor([2.0**exponent for exponent in exponents], dtype=torch.float32, device=device)


def is_float8(x: torch.Tensor) -> bool:
    """Whether a tensor holds float8 of the two kinds that caches use."""
    return x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
