"""quantize_kv bit for bit; apply_rope and merge_states as exact as plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...kernels.merge_states import merge_states
from ...kernels.quantize import quantize_kv
from ...kernels.rope import Llama31Scaling, RotaryEmbedding, apply_rope
from ...shapes import dtype_name
from ..numeric import assert_close_to_oracle, merge_oracle, rope_oracle
from .case import Check, ConformanceCase, threads_of_caller
from .judge import assert_rounded_once, assert_same, assert_same_memory, moves_as_reference, placed

__all__ = ["number_cases"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (80, 128, 192, 256)
# More than 16 bits count, and than the blocks that a grid may have along an axis.
MANY = 70_001
SCALED = (torch.int8, torch.float8_e4m3fn)
LLAMA31 = RotaryEmbedding(64, 500000.0, llama31=Llama31Scaling(old_context_len=100))
ROPES = {
    "half": RotaryEmbedding(64),
    "interleaved": RotaryEmbedding(64, interleaved=True),
    "partial": RotaryEmbedding(24, theta=500.0),
    "partial-interleaved": RotaryEmbedding(2, interleaved=True),
    "scaled": RotaryEmbedding(64, scale=4.0),
    "llama31": LLAMA31,
}


def number_cases() -> list[ConformanceCase]:
    """All cases of the three ops."""
    cases = {("quantize_kv", name): moves_as_reference(quantize_kv, make) for name, make in _rows().items()}
    cases |= {("apply_rope", name): _rotates(make) for name, make in _rotations().items()}
    cases |= {("merge_states", name): _merges(make) for name, make in _merges_of().items()}
    return [ConformanceCase(op, situation, check) for (op, situation), check in cases.items()]


def _rows() -> dict[str, Callable[[], dict[str, Any]]]:
    rows: dict[str, Callable[[], torch.Tensor]] = {
        **{dtype_name(dtype): partial(_random, 5, 3, 40, dtype=dtype) for dtype in DTYPES},
        "odd-width": partial(_random, 4, 3, 33),
        **{f"width-{dim}": partial(_random, 7, 2, dim) for dim in (64, 80, 128, 192, 256, 576)},
        **{f"width-128-{dtype_name(dtype)}": partial(_random, 7, 2, 128, dtype=dtype) for dtype in DTYPES[1:]},
        "40-heads": partial(_random, 9, 40, 16),
        "200-tokens": partial(_random, 200, 3, 16),
        "many-tokens": partial(_random, MANY, 1, 3),
        "subnormal-float16": lambda: (torch.randn(4, 3, 40) * 1e-6).half(),
        "width-1": partial(_random, 4, 3, 1),
        "width-0": partial(_random, 4, 3, 0),
        "empty": partial(_random, 0, 3, 8),
        "packed-qkv": lambda: torch.randn(5, 3 * 40 + 2)[:, 1:-1].view(5, 3, 40),
        "heads-first": lambda: torch.randn(3, 5, 40).transpose(0, 1),
        "zero-rows": lambda: torch.tensor([[[0.0, -0.0, 0.0]], [[1.0, 0.0, -2.0]]]),
        "NaN-rows": _not_finite,
        "ends-of-the-range": _ends_of_the_range,
        "halfway": _halfway,
    }
    return {
        f"{name}-to-{dtype_name(dtype)}": partial(_quantised, row, dtype)
        for name, row in rows.items()
        for dtype in SCALED
    }


def _quantised(row: Callable[[], torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    return {"x": row(), "dtype": dtype}


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape) * 3).to(dtype)


def _not_finite() -> torch.Tensor:
    x = torch.randn(5, 2, 19)
    x[1, 0, 18], x[2, 1, 0], x[3, 0, 7] = math.nan, math.inf, -math.inf
    return x


def _ends_of_the_range() -> torch.Tensor:
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    return torch.tensor([[1e-45, -1e-45, 0.0], [tiny, -tiny / 2, tiny * 3], [huge, -huge, huge / 4], [-4.0, 1e-30, 0]])[
        :, None
    ]


def _halfway() -> torch.Tensor:
    """Rows with a scale of exactly 1, for int8 and for float8, and quotients in the middle of two codes."""
    middles = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 17.0, 19.0, 34.0, 2.0**-10, 3 * 2.0**-10])
    return torch.stack([torch.cat([middles, torch.tensor([largest])]) for largest in (127.0, 448.0)])[:, None]


def _rotations() -> dict[str, Callable[[], dict[str, Any]]]:
    def rotation(x: torch.Tensor, rope: RotaryEmbedding) -> dict[str, Any]:
        return {"x": x, "positions": torch.randint(-5000, 150000, (x.shape[0],)), "rope": rope}

    return {
        **{name: lambda rope=rope: rotation(torch.randn(17, 3, 72), rope) for name, rope in ROPES.items()},  # type: ignore[misc]
        **{
            dtype_name(dtype): lambda dtype=dtype: rotation(torch.randn(17, 3, 64).to(dtype), LLAMA31)  # type: ignore[misc]
            for dtype in DTYPES[1:]
        },
        **{f"width-{dim}": lambda dim=dim: rotation(torch.randn(5, 2, dim), RotaryEmbedding(dim)) for dim in WIDTHS},  # type: ignore[misc]
        "40-heads": lambda: rotation(torch.randn(5, 40, 64), ROPES["half"]),
        "200-rows": lambda: rotation(torch.randn(200, 3, 64), ROPES["interleaved"]),
        "many-rows": lambda: rotation(torch.randn(MANY, 1, 4), RotaryEmbedding(4)),
        "strided": lambda: rotation(torch.randn(3, 9, 70)[:, 1:8:2, 3:67].transpose(0, 1), ROPES["half"]),
        "far-positions": lambda: {
            **rotation(torch.randn(3, 1, 8), RotaryEmbedding(8)),
            "positions": torch.tensor([2**40, -(2**40), 0]),
        },
        "empty": lambda: rotation(torch.randn(0, 3, 64), ROPES["half"]),
    }


def _rotates(make: Callable[[], dict[str, Any]]) -> Check:
    def check(backend: str, device: torch.device) -> None:
        call = make()
        there = placed(call, device)
        with threads_of_caller():
            rotated = apply_rope(**there, backend=backend).cpu()
        still = call["rope"].dim
        assert rotated.dtype == call["x"].dtype, f"x must have dtype {call['x'].dtype}, got {rotated.dtype}."
        assert_rounded_once("x", rotated, rope_oracle(**call), rope_oracle(**call, arithmetic=torch.float32))
        assert_same("columns beyond rope.dim", rotated[..., still:], call["x"][..., still:])
        assert_same_memory(there, call)

    return check


def _merges_of() -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        **{dtype_name(dtype): partial(_states, 5, 4, dtype=dtype) for dtype in DTYPES},
        "one-state": partial(_states, 5, 1),
        "many-states": partial(_states, 3, 33),
        "300-states": partial(_states, 2, 300),
        "200-tokens": partial(_states, 200, 3),
        "many-tokens": partial(_states, MANY, 2, heads=1, dim=1),
        "40-heads": partial(_states, 5, 4, heads=40),
        "odd-width": partial(_states, 5, 4, dim=7),
        **{f"width-{dim}": partial(_states, 5, 70, dim=dim) for dim in (64, 128, 256, 512)},
        **{f"many-states-{dtype_name(dtype)}": partial(_states, 7, 70, dtype=dtype) for dtype in DTYPES[1:]},
        "two-states-of-equal-weight": lambda: {**_states(40, 2), "lse": torch.randn(40, 1, 3).expand(-1, 2, -1)},
        "last-state-alone-saw-keys": _last_alone,
        "no-state": partial(_states, 4, 0),
        "empty": partial(_states, 0, 3),
        "states-without-keys": _blind_states,
        "strided": _strided_states,
        "far-apart": lambda: {**_states(5, 4), "lse": torch.randn(5, 4, 3) * 300},
    }


def _states(
    num_tokens: int, num_states: int, *, heads: int = 3, dim: int = 40, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    values, lse = torch.randn(num_tokens, num_states, heads, dim), torch.randn(num_tokens, num_states, heads) * 3
    return {"values": values.to(dtype), "lse": lse}


def _blind_states() -> dict[str, Any]:
    """Of some rows one state has seen no key, of one row none has; what they hold is NaN."""
    states = _states(5, 4)
    lse = states["lse"]
    lse[1, 2], lse[2], lse[3, 0] = -math.inf, -math.inf, -math.inf
    states["values"][lse == -math.inf] = math.nan
    return states


def _last_alone() -> dict[str, Any]:
    states = _states(5, 70)
    states["lse"][:, :-1], states["values"][:, :-1] = -math.inf, math.nan
    return states


def _strided_states() -> dict[str, Any]:
    values = torch.randn(3, 4, 5, 50).permute(2, 1, 0, 3)[..., 3:43]
    return {"values": values, "lse": torch.randn(3, 5, 8)[..., ::2].permute(1, 2, 0)}


def _merges(make: Callable[[], dict[str, Any]]) -> Check:
    def check(backend: str, device: torch.device) -> None:
        call = make()
        there = placed(call, device)
        with threads_of_caller():
            out, lse = (result.cpu() for result in merge_states(**there, backend=backend))
        dtypes = call["values"].dtype, torch.float32
        assert (out.dtype, lse.dtype) == dtypes, f"out and lse must have dtypes {dtypes}, got {out.dtype}, {lse.dtype}."
        exact, plain = merge_oracle(**call), merge_oracle(**call, arithmetic=torch.float32)
        assert_rounded_once("out", out, exact.out, plain.out)
        assert_close_to_oracle("lse", lse, exact.lse, plain.lse)
        assert_same_memory(there, call)

    return check
