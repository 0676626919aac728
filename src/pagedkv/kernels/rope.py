"""Rotary position embedding: pairs of a head's columns turned by an angle that grows with the position."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..shapes import Shapes, check_device, check_dtype, check_floating, check_int, check_last_dim_contiguous
from .backend import OpCall, select
from .kept_tensors import kept_tensors
from .pages import check_no_grad

__all__ = ["Llama31Scaling", "RotaryEmbedding", "apply_rope", "check_rope", "cos_sin_table"]


@dataclass(frozen=True)
class Llama31Scaling:
    """How Llama 3.1 stretches a trained context: slow frequencies are divided by `factor`, fast ones are kept.

    A frequency that turns fewer than low_freq_factor times in old_context_len positions is divided, one that turns more
    than high_freq_factor times is kept, those between are blended.
    Raises: ValueError, TypeError for factors that are not finite and positive or not in order.
    Source: Llama 3 (arXiv 2407.21783), released with Llama 3.1.
    """

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 8192
    factor: float = 8.0

    def __post_init__(self) -> None:
        check_int("old_context_len", self.old_context_len, minimum=1)
        for name in ("low_freq_factor", "high_freq_factor", "factor"):
            _check_positive(name, getattr(self, name))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor = {self.low_freq_factor}, got {self.high_freq_factor}."
            )


@dataclass(frozen=True)
class RotaryEmbedding:
    """Which columns of a head turn, and how fast; the angle of pair i at position p is p * inverse_frequencies()[i].

    dim:         columns that turn, the first `dim` of a head; even. The others stay as they are.
    theta:       pair i turns by theta ** (-2i / dim) a position.
    scale:       positions are divided by it ("linear" scaling; rope_scale of FlashInfer).
    interleaved: False pairs column i with i + dim / 2 (Llama, NeoX), True pairs 2i with 2i + 1 (GPT-J).
    llama31:     frequency scaling of Llama 3.1, or None.
    Raises:      ValueError, TypeError when a field is not usable, naming the field.
    Source:      RoFormer (arXiv 2104.09864), section 3.2.

    >>> RotaryEmbedding(dim=4, theta=100.0).inverse_frequencies()
    tensor([1.0000, 0.1000], dtype=torch.float64)
    """

    dim: int
    theta: float = 10000.0
    scale: float = 1.0
    interleaved: bool = False
    llama31: Llama31Scaling | None = None

    def __post_init__(self) -> None:
        check_int("dim", self.dim, minimum=2)
        if self.dim % 2:
            raise ValueError(f"dim must be even, got {self.dim}.")
        _check_positive("theta", self.theta)
        _check_positive("scale", self.scale)
        if not isinstance(self.interleaved, bool):
            raise TypeError(f"interleaved must be a bool, got {type(self.interleaved).__name__}.")
        if self.llama31 is not None and not isinstance(self.llama31, Llama31Scaling):
            raise TypeError(f"llama31 must be a Llama31Scaling or None, got {type(self.llama31).__name__}.")

    def inverse_frequencies(self) -> torch.Tensor:
        """Radians a position of each pair: float64 [dim / 2] on the CPU, both scalings included."""
        pairs = torch.arange(self.dim // 2, dtype=torch.float64, device="cpu")
        frequencies = float(self.theta) ** (-2.0 * pairs / self.dim)
        if self.llama31 is not None:
            low, high = self.llama31.low_freq_factor, self.llama31.high_freq_factor
            turns = self.llama31.old_context_len * frequencies / (2.0 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            frequencies = frequencies * (kept + (1.0 - kept) / self.llama31.factor)
        return frequencies / self.scale

    def pack(self) -> list[float]:
        """The fields as numbers, the argument of a torch op; `unpack` is the inverse."""
        packed = [float(self.dim), float(self.theta), float(self.scale), float(self.interleaved)]
        if self.llama31 is not None:
            low, high = float(self.llama31.low_freq_factor), float(self.llama31.high_freq_factor)
            packed += [low, high, float(self.llama31.old_context_len), float(self.llama31.factor)]
        return packed

    @classmethod
    def unpack(cls, packed: Sequence[float]) -> RotaryEmbedding:
        """Rebuilds an embedding from what `pack` gave."""
        dim, theta, scale, interleaved, *scaling = packed
        llama31 = None
        if scaling:
            low_freq_factor, high_freq_factor, old_context_len, factor = scaling
            llama31 = Llama31Scaling(low_freq_factor, high_freq_factor, int(old_context_len), factor)
        return cls(int(dim), theta, scale, bool(interleaved), llama31)


def apply_rope(
    x: torch.Tensor, positions: torch.Tensor, rope: RotaryEmbedding, *, backend: str = "auto"
) -> torch.Tensor:
    """Turns queries or keys by the angles of their positions.

    Shapes: x [T, H, D], D >= rope.dim; positions [T] int64. Returns a new tensor [T, H, D] in the dtype of x.
    Rule:   each pair (a, b) of columns becomes (a cos - b sin, b cos + a sin) of its angle; arithmetic is float32, on
            cos and sin that are computed in float64 and rounded once. Positions may be negative.
    Raises: ValueError, TypeError for what breaks the lines above and for an x that requires a gradient while gradients
            are recorded.
    Source: RoFormer (arXiv 2104.09864), section 3.4.2. Reference: kernels/reference/rope.py.

    >>> apply_rope(torch.tensor([[[1.0, 0.0]]]), torch.tensor([2]), RotaryEmbedding(dim=2))
    tensor([[[-0.4161,  0.9093]]])
    """
    check_no_grad(x=x)
    check_rope(rope)
    if torch.compiler.is_compiling():
        rotated: torch.Tensor = _apply_rope_op(x, positions, rope.pack(), backend)
        return rotated
    return _apply_rope(x, positions, rope, backend)


def check_rope(rope: object) -> RotaryEmbedding:
    """Refuses what is not a RotaryEmbedding."""
    if not isinstance(rope, RotaryEmbedding):
        raise TypeError(f"rope must be a RotaryEmbedding, got {type(rope).__name__}.")
    return rope


def cos_sin_table(rope: RotaryEmbedding, num_positions: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Cosine and sine of every pair at positions 0 .. num_positions - 1: float32 [num_positions, dim / 2, 2].

    Rule:   computed in float64 and rounded once.
    Owns:   a view of a table that calls share: not to be written. It is kept for the next power of two, so that a
            growing sequence does not make a new one each step.

    >>> cos_sin_table(RotaryEmbedding(dim=4), 3).shape
    torch.Size([3, 2, 2])
    """
    check_int("num_positions", num_positions, minimum=0)
    rows: int = 1 << max(num_positions - 1, 0).bit_length()
    (table,) = _table(rope, rows, torch.device(device))
    return table if rows == num_positions else table[:num_positions]


# A model has one or two embeddings; a table of 128 ki positions and 128 columns is 64 MiB, and all shorter ones are
# together as large. They stay, because a captured graph reads the table it was captured with.
@kept_tensors(maxsize=64)
def _table(rope: RotaryEmbedding, rows: int, device: torch.device) -> tuple[torch.Tensor]:
    angles = torch.outer(torch.arange(rows, dtype=torch.float64, device="cpu"), rope.inverse_frequencies())
    return (torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device),)


def _apply_rope(x: torch.Tensor, positions: torch.Tensor, rope: RotaryEmbedding, backend: str) -> torch.Tensor:
    shapes = Shapes()
    shapes.check("x", x, "T H D")
    shapes.check("positions", positions, "T")
    check_floating("x", x)
    check_last_dim_contiguous("x", x)
    check_dtype("positions", positions, torch.int64)
    check_device("positions", positions, x.device, "x")
    if rope.dim > shapes["D"]:
        raise ValueError(f"rope.dim must be at most {shapes['D']} (D of x), got {rope.dim}.")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    call = OpCall("apply_rope", x.device.type, (x.dtype,), shapes["D"])
    select(call, backend)(x, positions, rope, out)
    return out


@torch.library.custom_op("pagedkv::apply_rope", mutates_args=())
def _apply_rope_op(x: torch.Tensor, positions: torch.Tensor, rope: Sequence[float], backend: str) -> torch.Tensor:
    return _apply_rope(x, positions, RotaryEmbedding.unpack(rope), backend)


@_apply_rope_op.register_fake
def _apply_rope_shape(x: torch.Tensor, positions: torch.Tensor, rope: Sequence[float], backend: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and positive, got {value}.")
