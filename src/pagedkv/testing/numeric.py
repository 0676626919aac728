"""What attention, rotation and merging should give, in float64, and how far a result may be off: derived, not chosen.

The rule: the largest error against float64 is at most twice the largest error of the same formula in plain torch with
float32 arithmetic on the same inputs, plus one rounding to the dtype of the result. A softmax from a table may be off
by what follows from the bound that the table states.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..kernels.attention_plan import AttentionPlan
from ..kernels.exp_table import check_softmax
from ..kernels.merge_states import AttentionState
from ..kernels.rope import RotaryEmbedding

__all__ = [
    "TableErrors",
    "assert_attention_close",
    "assert_close_to_oracle",
    "attention_oracle",
    "merge_oracle",
    "rope_oracle",
    "table_errors",
]


def attention_oracle(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    *,
    layout: str = "NHD",
    sm_scale: float | None = None,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    rope: RotaryEmbedding | None = None,
    key_scales: float | torch.Tensor | None = None,
    value_scales: float | torch.Tensor | None = None,
    arithmetic: torch.dtype = torch.float64,
) -> AttentionState:
    """Attention of one sequence and one head at a time, from the definition; shares no code with any back end.

    Shapes: as `pagedkv.paged_attention`; the result is in `arithmetic`.
    """
    if layout == "HND":
        key_pages, value_pages = key_pages.transpose(1, 2), value_pages.transpose(1, 2)
    out = torch.zeros(plan.num_tokens, plan.num_q_heads, plan.value_dim, dtype=arithmetic)
    lse = torch.full((plan.num_tokens, plan.num_q_heads), -math.inf, dtype=arithmetic)
    scale = 1 / math.sqrt(plan.head_dim) if sm_scale is None else sm_scale
    for sequence in range(plan.num_seqs):
        start, stop = plan.query_indptr[sequence : sequence + 2].tolist()
        pages, offsets = _slots(plan, sequence)
        positions = torch.arange(len(pages) - (stop - start), len(pages))[:, None]
        keys = torch.arange(len(pages))
        seen = _seen(plan, sequence, positions, keys)
        if rope is not None:
            row_turns, key_turns = (_turns(rope, at, arithmetic) for at in (positions[:, 0], keys))
        for head in range(plan.num_q_heads):
            at = pages, offsets, head // plan.group
            row, key = query[start:stop, head].to(arithmetic), _elements(key_pages, key_scales, at, arithmetic)
            if rope is not None:
                row, key = _rotated(row, row_turns, rope), _rotated(key, key_turns, rope)
            logits = (row @ key.T) * scale
            if soft_cap:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            if alibi_slopes is not None:
                logits = logits + alibi_slopes[head].to(arithmetic) * (keys - positions)
            logits = logits.masked_fill(~seen, -math.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head].to(arithmetic).expand(stop - start, 1)], 1)
            row_lse = torch.logsumexp(logits, 1)
            weights = torch.exp(logits - row_lse.masked_fill(row_lse == -math.inf, 0.0)[:, None])[:, : len(pages)]
            lse[start:stop, head] = row_lse
            out[start:stop, head] = weights @ _elements(value_pages, value_scales, at, arithmetic)
    return AttentionState(out, lse)


def rope_oracle(
    x: torch.Tensor, positions: torch.Tensor, rope: RotaryEmbedding, arithmetic: torch.dtype = torch.float64
) -> torch.Tensor:
    """The rotation of x [T, H, D] as a product of complex numbers, one head at a time."""
    turns = _turns(rope, positions, arithmetic)
    return torch.stack([_rotated(head.to(arithmetic), turns, rope) for head in x.unbind(1)], 1)


def merge_oracle(values: torch.Tensor, lse: torch.Tensor, arithmetic: torch.dtype = torch.float64) -> AttentionState:
    """The merge of states [T, K, Hq, Dv] in one step, as a softmax over K."""
    seen = lse > -math.inf
    merged = torch.logsumexp(lse.to(arithmetic), 1)
    weights = torch.exp(lse.to(arithmetic) - merged.masked_fill(merged == -math.inf, 0.0)[:, None])
    values = torch.where(seen[..., None], values.to(arithmetic), 0.0)
    return AttentionState((values * weights[..., None]).sum(1), merged)


def assert_attention_close(
    actual: AttentionState,
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    *,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Asserts out and lse of a `paged_attention(..., return_lse=True)` with these arguments by the rule above."""
    expected = out_dtype or query.dtype
    assert actual.out.dtype == expected, f"out must have dtype {expected}, got {actual.out.dtype}."
    by_table = table_errors(options.pop("softmax", "exact"), value_pages, options.get("value_scales"))
    exact = attention_oracle(query, key_pages, value_pages, plan, **options)
    plain = attention_oracle(query, key_pages, value_pages, plan, **options, arithmetic=torch.float32)
    assert_close_to_oracle("out", actual.out, exact.out, plain.out, by_table.out)
    assert_close_to_oracle("lse", actual.lse, exact.lse, plain.lse, by_table.lse)


class TableErrors(NamedTuple):
    """How far a table of exponentials may move out and lse; 0 without one."""

    out: float
    lse: float


def table_errors(softmax: object, value_pages: torch.Tensor, value_scales: float | torch.Tensor | None) -> TableErrors:
    """What follows from weights within a relative e of theirs: 2e / (1 - e) of the largest value, e / (1 - e) in lse.

    Pages are in NHD order, or have no scales that are tensors. NaN, which marks slots nobody owns, is left out.
    """
    table = check_softmax(softmax)
    if table is None:
        return TableErrors(0.0, 0.0)
    relative = table.max_relative_error / (1 - table.max_relative_error)
    values = value_pages.double()
    if isinstance(value_scales, torch.Tensor):
        values = values * value_scales.double().transpose(1, 2)[..., None]
    elif value_scales is not None:
        values = values * value_scales
    largest = float(values.abs().nan_to_num(nan=0.0).max()) if values.numel() else 0.0
    return TableErrors(2 * relative * largest, relative)


def assert_close_to_oracle(
    name: str, actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, also_allowed: float = 0.0
) -> None:
    """Asserts the rule of this file; entries that are -inf or exactly 0 in `exact` must be just that."""
    assert actual.shape == exact.shape, f"{name} must have shape {list(exact.shape)}, got {list(actual.shape)}."
    fixed = exact.isinf() | (exact == 0)
    assert torch.equal(actual[fixed].double(), exact[fixed]), (
        f"{name} must be exactly {exact[fixed]}, got {actual[fixed]}."
    )
    exact, plain, actual = exact[~fixed], plain[~fixed].double(), actual[~fixed]
    if not exact.numel():
        return
    rounding = torch.finfo(actual.dtype).eps * float(exact.abs().max())
    allowed = 2 * float((plain - exact).abs().max()) + rounding + also_allowed
    error = float((actual.double() - exact).abs().nan_to_num(nan=math.inf).max())
    assert error <= allowed, f"{name} must be within {allowed:.3g} of float64, got an error of {error:.3g}."


def _slots(plan: AttentionPlan, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and offset of each token of a sequence."""
    tokens = torch.arange(int(plan.seq_lens[sequence]))
    first = int(plan.page_indptr[sequence])
    return plan.page_indices[first + tokens // plan.page_size].long(), tokens % plan.page_size


def _elements(
    pages: torch.Tensor,
    scales: float | torch.Tensor | None,
    at: tuple[torch.Tensor, torch.Tensor, int],
    arithmetic: torch.dtype,
) -> torch.Tensor:
    """[kv_len, D]: what the tokens of one sequence and head stand for."""
    elements = pages[at].to(arithmetic)
    if isinstance(scales, torch.Tensor):
        page, offset, head = at
        return elements * scales[page, head, offset].to(arithmetic)[:, None]
    return elements if scales is None else elements * scales


def _turns(rope: RotaryEmbedding, positions: torch.Tensor, arithmetic: torch.dtype) -> torch.Tensor:
    """[n, dim / 2] complex: e^(i * angle) of each position and pair."""
    angle_of_one = torch.tensor([_angle(rope, pair) for pair in range(rope.dim // 2)], dtype=torch.float64)
    # The angle is exact and its cosine and sine rounded once, whatever the arithmetic: in float32 it would be far off
    # at high positions, and far off would then be allowed.
    angles = torch.outer(positions.double(), angle_of_one)
    return torch.complex(angles.cos().to(arithmetic), angles.sin().to(arithmetic))


def _rotated(x: torch.Tensor, turns: torch.Tensor, rope: RotaryEmbedding) -> torch.Tensor:
    """x [n, D] with the pairs of its first rope.dim columns, as complex numbers, times `turns`."""
    columns = torch.arange(rope.dim)
    first, second = (columns[0::2], columns[1::2]) if rope.interleaved else columns.chunk(2)
    turned = torch.complex(x[:, first], x[:, second]) * turns
    result = x.clone()
    result[:, first], result[:, second] = turned.real, turned.imag
    return result


def _angle(rope: RotaryEmbedding, pair: int) -> float:
    """Radians that a pair turns a position."""
    angle: float = float(rope.theta) ** (-2.0 * pair / rope.dim)
    if rope.llama31 is not None:
        num_turns = rope.llama31.old_context_len * angle / (2 * math.pi)
        if num_turns < rope.llama31.low_freq_factor:
            angle /= rope.llama31.factor
        elif num_turns <= rope.llama31.high_freq_factor:
            span = rope.llama31.high_freq_factor - rope.llama31.low_freq_factor
            share = (num_turns - rope.llama31.low_freq_factor) / span
            angle = (1 - share) * angle / rope.llama31.factor + share * angle
    return angle / rope.scale


def _seen(plan: AttentionPlan, sequence: int, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[q_len, kv_len] bool: which keys each row sees."""
    seen = torch.ones(len(positions), len(keys), dtype=torch.bool)
    if plan.causal:
        seen &= keys <= positions
    if plan.window_left >= 0:
        seen &= keys >= positions - plan.window_left
    if plan.custom_mask is not None and plan.mask_indptr is not None:
        start = int(plan.mask_indptr[sequence])
        seen &= plan.custom_mask[start : start + seen.numel()].view_as(seen)
    return seen
