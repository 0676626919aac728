"""flashinfer.cascade: partial results of attention, merged. LSE is base 2 here."""

from __future__ import annotations

import math

import torch

from ...kernels import merge_states as merge_natural
from ...kernels.pages import check_no_grad, check_writable
from ...shapes import Shapes, check_device, check_floating, dtype_name
from .arguments import int32_indices
from .utils import log2e

__all__ = ["merge_state", "merge_state_in_place", "merge_states", "variable_length_merge_states"]

Merged = tuple[torch.Tensor, torch.Tensor]


def merge_state(v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor) -> Merged:
    """Merges attention over two disjoint sets of keys into attention over both.

    Shapes: v_a, v_b [n, H, D]; s_a, s_b [n, H], base 2, of any floating dtype. Returns v [n, H, D] in the dtype of v_a
            and s [n, H] float32.
    Rule:   a state with s = -inf has seen no key and is ignored, whatever v holds; two of them give exactly 0 and -inf.
    Raises: ValueError, TypeError for what breaks the lines above.
    """
    _check_states({"v_a": v_a, "v_b": v_b}, {"s_a": s_a, "s_b": s_b}, "n H D")
    return _merged(torch.stack((v_a, v_b), dim=1), torch.stack((s_a.float(), s_b.float()), dim=1))


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """`merge_state` that writes to v and s.

    Shapes: v, v_other [n, H, D]; s, s_other [n, H]; mask [n], bool or integer: rows where it is 0 stay as they are.
    Rule:   s may have any floating dtype; it is written in its own. Nothing is written if the call raises.
    Raises: ValueError, TypeError for what breaks the lines above, for expanded v or s.
    """
    _check_states({"v": v, "v_other": v_other}, {"s": s, "s_other": s_other}, "n H D")
    check_writable("v", v)
    check_writable("s", s)
    if mask is not None:
        Shapes(n=v.shape[0]).check("mask", mask, "n")
        check_device("mask", mask, v.device, "v")
    merged_v, merged_s = merge_state(v, s, v_other, s_other)
    if mask is not None:
        rows = mask != 0
        merged_v = torch.where(rows[:, None, None], merged_v, v)
        merged_s = torch.where(rows[:, None], merged_s, s.float())
    v.copy_(merged_v)
    s.copy_(merged_s)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> Merged:
    """Merges attention over any number of disjoint sets of keys.

    Shapes: v [n, num_states, H, D]; s [n, num_states, H], base 2. Returns v [n, H, D] in the dtype of v and
            s [n, H] float32.
    Rule:   no state gives 0 and -inf, one is returned as it is; otherwise as `merge_state`, from state 0 up.
    Raises: ValueError, TypeError for what breaks the lines above.
    """
    _check_states({"v": v}, {"s": s}, "n num_states H D")
    if v.shape[1] == 1:
        return v[:, 0].clone(), s[:, 0].to(torch.float32, copy=True)
    return _merged(v.contiguous(), s.float())


def variable_length_merge_states(v: torch.Tensor, s: torch.Tensor, indptr: torch.Tensor) -> Merged:
    """Merges a number of states of its own for each row.

    Shapes: v [nnz, H, D]; s [nnz, H], base 2; indptr [n + 1] int32 or int64, from 0, indptr[-1] <= nnz. Returns
            v [n, H, D] in the dtype of v and s [n, H] float32.
    Rule:   row i is merged from the states [indptr[i], indptr[i + 1]), as `merge_states` does it.
    Raises: ValueError, TypeError for what breaks the lines above.
    """
    _check_states({"v": v}, {"s": s}, "nnz H D")
    starts = int32_indices("indptr", indptr, torch.device("cpu")).long()
    if starts.dim() != 1 or not starts.shape[0]:
        raise ValueError(f"indptr must have shape [n + 1], got {list(starts.shape)}.")
    num_states = starts.diff()
    if int(starts[0]) != 0 or bool((num_states < 0).any()) or int(starts[-1]) > v.shape[0]:
        raise ValueError(f"indptr must rise from 0 to at most {v.shape[0]} (nnz of v), got {starts.tolist()}.")
    most = int(num_states.max()) if num_states.numel() else 0
    entries = torch.arange(most, device="cpu")
    # Rows with fewer states than the others are filled up with states that have seen no key.
    missing = (entries >= num_states[:, None]).to(v.device)
    states = (starts[:-1, None] + entries).clamp(max=max(v.shape[0] - 1, 0)).to(v.device)
    return _merged(v[states], s[states].float().masked_fill(missing[..., None], -math.inf))


def _merged(v: torch.Tensor, s: torch.Tensor) -> Merged:
    """v [n, K, H, D], s [n, K, H] float32."""
    num_rows, num_states, num_heads, dim = v.shape
    if not num_states:
        return v.new_zeros(num_rows, num_heads, dim), s.new_full((num_rows, num_heads), -math.inf)
    # Relative to the highest, the change of base rounds numbers near 0 only, and a state alone keeps its s to the bit.
    highest = s.amax(dim=1)
    base = highest.masked_fill(highest == -math.inf, 0.0)
    out, lse = merge_natural(v, (s - base[:, None]) * math.log(2))
    return out, base + lse * log2e


def _check_states(values: dict[str, torch.Tensor], lse: dict[str, torch.Tensor], pattern: str) -> None:
    """All values alike in shape, dtype and device; all s [...] of the same leading dims, of any floating dtype."""
    shapes = Shapes()
    owner = next(iter(values))
    for name, tensor in values.items():
        shapes.check(name, tensor, pattern)
        check_floating(name, tensor)
        check_device(name, tensor, values[owner].device, owner)
        dtype = values[owner].dtype
        if tensor.dtype != dtype:
            raise ValueError(
                f"{name} must have dtype {dtype_name(dtype)} like {owner}, got {dtype_name(tensor.dtype)}."
            )
    for name, tensor in lse.items():
        shapes.check(name, tensor, pattern.removesuffix(" D"))
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating dtype, got {dtype_name(tensor.dtype)}.")
        check_device(name, tensor, values[owner].device, owner)
    check_no_grad(**values, **lse)
