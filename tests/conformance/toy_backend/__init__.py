"""A back end in numpy, written loop by loop: what a new one looks like. `register` is its one registration."""

from __future__ import annotations

import torch

import pagedkv
from pagedkv.kernels import OpCall

from . import attention, moves, quantising, states

__all__ = ["register"]

# float16 and float32 are what it computes in; int8 it moves and makes.
_MOVED = {torch.float32, torch.float16, torch.int8}
_COMPUTED = {torch.float32, torch.float16}
_FEATURES = {"alibi_slopes", "custom_mask", "sinks", "soft_cap", "value_scale"}


def register(name: str = "toy", priority: int = 0) -> None:
    """Adds the back end."""
    pagedkv.register_backend(
        name,
        ops={
            "store_kv": moves.store_kv,
            "gather_kv": moves.gather_kv,
            "copy_pages": moves.copy_pages,
            "quantize_kv": quantising.quantize_kv,
            "paged_attention": attention.paged_attention,
            "merge_states": states.merge_states,
        },
        rejects=_rejects,
        priority=priority,
    )


def _rejects(call: OpCall) -> str | None:
    if call.device_type != "cpu":
        return f"tensors are on {call.device_type}"
    known = _COMPUTED if call.op in ("paged_attention", "merge_states") else _MOVED
    for dtype in call.dtypes:
        if dtype not in known:
            return f"it has no {str(dtype).removeprefix('torch.')}"
    if call.op == "paged_attention" and not call.features <= _FEATURES:
        return f"it has no {', '.join(sorted(call.features - _FEATURES))}"
    return None
