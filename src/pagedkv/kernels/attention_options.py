"""The options of paged_attention: as callers give them, and, once checked, as back ends get them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..shapes import QUANTISED_DTYPES, Shapes, check_device, check_dtype, dtype_name
from .attention_checks import as_float32
from .attention_plan import AttentionPlan
from .exp_table import ExpTable, check_softmax
from .rope import RotaryEmbedding, check_rope, cos_sin_table

__all__ = ["OUT_DTYPES", "AttentionOptions", "AttentionRequest", "check_out_dtype"]

OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """What a back end computes besides the plan. All tensors are float32.

    Shapes: sinks [Hq]; alibi_slopes [Hq]; key_scales [N, Hk, P]; value_scales [N, Hk, P], these two of any strides and
            read for the tokens of a sequence alone; rope_table [R, dim / 2, 2], contiguous: cosine and sine at
            positions 0 .. R - 1. R is above every key position and above minus the position of every row.
    Rule:   a key is its element * key_scales[page, head, offset], then turned by rope_table; a scale that is one number
            for all keys is already in sm_scale. A value is its element * value_scales[page, head, offset];
            value_scale multiplies the output, not the LSE. rope_interleaved pairs columns (2i, 2i + 1), otherwise
            (i, i + dim / 2). The sine of a negative position is minus that of its absolute value. With an exp_table the
            weights of a row's keys are its exponentials; sums, sinks and rescaling need not be.
    """

    sm_scale: float
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    value_scale: float = 1.0
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None
    rope_table: torch.Tensor | None = None
    rope_interleaved: bool = False
    exp_table: ExpTable | None = None

    def features(self) -> list[str]:
        """The options in use, as `OpCall` names them."""
        used = []
        if self.soft_cap:
            used.append("soft_cap")
        if self.sinks is not None:
            used.append("sinks")
        if self.alibi_slopes is not None:
            used.append("alibi_slopes")
        if self.value_scale != 1.0:
            used.append("value_scale")
        if self.key_scales is not None or self.value_scales is not None:
            used.append("scales")
        if self.rope_table is not None:
            used.append("rope")
        if self.exp_table is not None:
            used.append("exp_table")
        return used


class AttentionRequest(NamedTuple):
    """The options as callers give them. `pack` lays any number of them out as three lists: what torch ops can take."""

    sm_scale: float | None = None
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    rope: RotaryEmbedding | None = None
    key_scales: float | torch.Tensor | None = None
    value_scales: float | torch.Tensor | None = None
    out_dtype: torch.dtype | None = None
    softmax: str | ExpTable = "exact"

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The options that are tensors, by name."""
        return {
            "sinks": self.sinks,
            "alibi_slopes": self.alibi_slopes,
            "key_scales": self.key_scales if isinstance(self.key_scales, torch.Tensor) else None,
            "value_scales": self.value_scales if isinstance(self.value_scales, torch.Tensor) else None,
        }

    def pack(self) -> tuple[list[torch.Tensor | None], list[float], list[int]]:
        """The request as the arguments of a torch op; `unpack` is the inverse."""
        check_out_dtype(self.out_dtype)
        rope = [] if self.rope is None else check_rope(self.rope).pack()
        tensors = list(self.tensors().values())
        scalars = [
            None if isinstance(given, torch.Tensor) else given
            for given in (self.sm_scale, self.key_scales, self.value_scales)
        ]
        table = check_softmax(self.softmax)
        floats = [self.soft_cap, *(0.0 if scalar is None else scalar for scalar in scalars)]
        floats += [0.0, 0.0] if table is None else [float(table.num_entries), table.max_distance]
        floats += rope
        flags = [int(scalar is not None) for scalar in scalars]
        flags.append(-1 if self.out_dtype is None else OUT_DTYPES.index(self.out_dtype))
        return tensors, floats, flags

    @classmethod
    def unpack(
        cls, tensors: Sequence[torch.Tensor | None], floats: Sequence[float], flags: Sequence[int]
    ) -> AttentionRequest:
        """Rebuilds a request from what `pack` gave."""
        sinks, alibi_slopes, key_scales, value_scales = tensors
        soft_cap, *scalars, num_entries, max_distance = floats[:6]
        *is_given, dtype = flags
        sm_scale, key_scale, value_scale = (
            scalar if given else None for scalar, given in zip(scalars, is_given, strict=True)
        )
        return cls(
            sm_scale=sm_scale,
            soft_cap=soft_cap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            rope=RotaryEmbedding.unpack(floats[6:]) if len(floats) > 6 else None,
            key_scales=key_scale if key_scales is None else key_scales,
            value_scales=value_scale if value_scales is None else value_scales,
            out_dtype=None if dtype < 0 else OUT_DTYPES[dtype],
            softmax=ExpTable(int(num_entries), max_distance) if num_entries else "exact",
        )

    def checked(self, key_pages: torch.Tensor, plan: AttentionPlan) -> AttentionOptions:
        """The options as back ends get them, of a call whose other tensors were checked; key_pages in NHD order."""
        if self.out_dtype is not None:
            check_out_dtype(self.out_dtype)
        soft_cap = 0.0 if self.soft_cap == 0 else as_float32("soft_cap", self.soft_cap)
        if soft_cap < 0 or (soft_cap == 0 and self.soft_cap != 0):
            raise ValueError(f"soft_cap must be 0 (off) or a positive float32, got {self.soft_cap}.")
        sm_scale = 1.0 / math.sqrt(plan.head_dim) if self.sm_scale is None else as_float32("sm_scale", self.sm_scale)
        key_scale, key_scales = _checked_scales("key_scales", self.key_scales, key_pages)
        if key_scale != 1.0:
            sm_scale = as_float32("sm_scale * key_scales", sm_scale * key_scale)
        value_scale, value_scales = _checked_scales("value_scales", self.value_scales, key_pages)
        return AttentionOptions(
            sm_scale,
            soft_cap,
            None if self.sinks is None else _checked_per_head("sinks", self.sinks, key_pages, plan),
            None
            if self.alibi_slopes is None
            else _checked_per_head("alibi_slopes", self.alibi_slopes, key_pages, plan),
            value_scale,
            key_scales,
            value_scales,
            None if self.rope is None else _rope_table(check_rope(self.rope), key_pages.device, plan),
            self.rope is not None and self.rope.interleaved,
            check_softmax(self.softmax),
        )


def check_out_dtype(out_dtype: object) -> None:
    """Refuses a dtype that a result cannot have."""
    if out_dtype is None or out_dtype in OUT_DTYPES:
        return
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype must be a torch.dtype or None, got {type(out_dtype).__name__}.")
    raise ValueError(f"out_dtype must be {' or '.join(map(dtype_name, OUT_DTYPES))}, got {dtype_name(out_dtype)}.")


def _checked_per_head(name: str, per_head: torch.Tensor, key_pages: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    if not _is_float32(per_head, (plan.num_q_heads,), key_pages):
        Shapes(Hq=plan.num_q_heads).check(name, per_head, "Hq")
        check_dtype(name, per_head, torch.float32)
        check_device(name, per_head, key_pages.device, "key_pages")
    return per_head.contiguous()  # kernels read it as a flat array


def _checked_scales(name: str, scales: Any, key_pages: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """One number for all pages and, where there are such, the scales of each token and head."""
    if scales is None:
        if key_pages.dtype == torch.int8:
            raise ValueError(f"{name} must be given for int8 pages, got None. Pass a float or float32 [N, Hk, P].")
        return 1.0, None
    if not isinstance(scales, torch.Tensor):
        return as_float32(name, scales), None
    if key_pages.dtype not in QUANTISED_DTYPES:
        raise ValueError(
            f"{name} must be a float or None for {dtype_name(key_pages.dtype)} pages, got a tensor. "
            "Only the tokens of quantised pages have scales of their own."
        )
    num_pages, page_size, num_kv_heads, _ = key_pages.shape
    if not _is_float32(scales, (num_pages, num_kv_heads, page_size), key_pages):
        shapes = Shapes()
        for symbol, count in (("N", num_pages), ("Hk", num_kv_heads), ("P", page_size)):
            shapes.bind(symbol, count, "key_pages")
        shapes.check(name, scales, "N Hk P")
        check_dtype(name, scales, torch.float32)
        check_device(name, scales, key_pages.device, "key_pages")
    return 1.0, scales


def _is_float32(tensor: object, shape: tuple[int, ...], key_pages: torch.Tensor) -> bool:
    """Whether a tensor is plainly right; if not, the checks one by one find the words, or let it pass."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype == torch.float32
        and tensor.shape == shape
        and tensor.device == key_pages.device
        and not tensor.is_neg()
    )


def _rope_table(rope: RotaryEmbedding, device: torch.device, plan: AttentionPlan) -> torch.Tensor:
    if rope.dim > plan.head_dim:
        raise ValueError(f"rope.dim must be at most {plan.head_dim} (head_dim of the plan), got {rope.dim}.")
    return cos_sin_table(rope, plan.num_positions, device)
