"""Merges attention over disjoint parts of the keys into attention over their union."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..shapes import Shapes, check_device, check_dtype, check_floating, check_last_dim_contiguous
from .backend import OpCall, select
from .pages import check_no_grad

__all__ = ["AttentionState", "merge_states"]


class AttentionState(NamedTuple):
    """Attention output and the natural logarithm of its softmax denominator."""

    out: torch.Tensor
    lse: torch.Tensor


def merge_states(values: torch.Tensor, lse: torch.Tensor, *, backend: str = "auto") -> AttentionState:
    """Merges K attention states of the same queries over disjoint sets of keys.

    Shapes: values [T, K, Hq, Dv]; lse [T, K, Hq] float32, natural logarithm. Returns out [T, Hq, Dv] in the dtype of
            values and lse [T, Hq] float32.
    Order:  states are folded in from k = 0 up, in float32. A state with lse -inf has seen no key and is ignored,
            whatever its values hold; when all are, the result is exactly 0 and -inf.
    Raises: ValueError, TypeError for a shape, dtype or device that breaks the lines above.
    Source: FlashInfer (arXiv 2501.01005), section 2.2. Reference: kernels/reference/merge_states.py.
    """
    check_no_grad(values=values, lse=lse)
    op = _merge_states_op if torch.compiler.is_compiling() else _merge_states
    return AttentionState(*op(values, lse, backend))


def _merge_states(values: torch.Tensor, lse: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = Shapes()
    shapes.check("values", values, "T K Hq Dv")
    shapes.check("lse", lse, "T K Hq")
    check_floating("values", values)
    check_last_dim_contiguous("values", values)
    check_dtype("lse", lse, torch.float32)
    check_device("lse", lse, values.device, "values")
    call = OpCall("merge_states", values.device.type, (values.dtype,))
    out = values.new_empty(shapes["T"], shapes["Hq"], shapes["Dv"])
    out_lse = lse.new_empty(shapes["T"], shapes["Hq"])
    select(call, backend)(values, lse, out, out_lse)
    return out, out_lse


_merge_states_op = torch.library.custom_op("pagedkv::merge_states", _merge_states, mutates_args=())


@_merge_states_op.register_fake
def _merge_states_shape(values: torch.Tensor, lse: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, _, num_heads, dim = values.shape
    return values.new_empty(num_tokens, num_heads, dim), lse.new_empty(num_tokens, num_heads)
