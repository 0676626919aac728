"""The native CPU core: C++ kernels per instruction set, loaded at the first call that needs them."""

from __future__ import annotations

from ..backend import OpCall, register_backend
from .copy_pages import copy_pages
from .gather_kv import gather_kv
from .merge_states import merge_states
from .mla_attention import mla_attention
from .native import unavailable
from .paged_attention import paged_attention
from .quantize import quantize_kv
from .rope_store_kv import rope_store_kv
from .store_kv import store_kv

__all__ = [
    "copy_pages",
    "gather_kv",
    "merge_states",
    "mla_attention",
    "paged_attention",
    "quantize_kv",
    "register",
    "rope_store_kv",
    "store_kv",
]

_ATTENTION_FEATURES = frozenset(
    {"alibi_slopes", "custom_mask", "exp_table", "rope", "scales", "sinks", "soft_cap", "value_scale"}
)


def register() -> None:
    """Adds the back end "cpu"."""
    register_backend(
        "cpu",
        ops={
            "quantize_kv": quantize_kv,
            "store_kv": store_kv,
            "gather_kv": gather_kv,
            "copy_pages": copy_pages,
            "paged_attention": paged_attention,
            "merge_states": merge_states,
            "mla_attention": mla_attention,
            "rope_store_kv": rope_store_kv,
        },
        rejects=_rejects,
        unavailable=unavailable,
    )


def _rejects(call: OpCall) -> str | None:
    if call.device_type != "cpu":
        return f"tensors are on {call.device_type}"
    if call.op == "paged_attention":
        missing = sorted(call.features - _ATTENTION_FEATURES)
        if missing:
            return f"it has no {', '.join(missing)}"
        if call.head_dim % 8 or call.value_dim % 8:
            return f"head dims must be multiples of 8, got {call.head_dim} and {call.value_dim}"
    if call.op == "mla_attention" and (call.head_dim % 8 or call.value_dim % 8):
        rope_dim = call.head_dim - call.value_dim
        return f"latent and rope dims must be multiples of 8, got {call.value_dim} and {rope_dim}"
    return None
