"""Every op in plain torch, on any device: the specification, and what runs where nothing faster can."""

from __future__ import annotations

from ..backend import register_backend
from .copy_pages import copy_pages
from .gather_kv import gather_kv
from .merge_states import merge_states
from .mla_attention import mla_attention
from .paged_attention import paged_attention
from .quantize import quantize_kv
from .rope import apply_rope
from .rope_store_kv import rope_store_kv
from .store_kv import store_kv

__all__ = [
    "apply_rope",
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


def register() -> None:
    """Adds the back end "reference", tried last."""
    register_backend(
        "reference",
        ops={
            "quantize_kv": quantize_kv,
            "store_kv": store_kv,
            "gather_kv": gather_kv,
            "copy_pages": copy_pages,
            "apply_rope": apply_rope,
            "rope_store_kv": rope_store_kv,
            "paged_attention": paged_attention,
            "mla_attention": mla_attention,
            "merge_states": merge_states,
        },
        priority=-100,
    )
