"""Functions on tensors, each behind a table of back ends; they know nothing of sequences or tiers."""

from __future__ import annotations

from . import cpu, reference
from .attention_plan import AttentionPlan
from .backend import BackendStatus, OpCall, backends, register_backend, unregister_backend
from .compare_key import fast_compare_key
from .copy_pages import copy_pages
from .gather_kv import gather_kv
from .merge_states import AttentionState, merge_states
from .paged_attention import AttentionOptions, paged_attention
from .store_kv import store_kv

__all__ = [
    "AttentionOptions",
    "AttentionPlan",
    "AttentionState",
    "BackendStatus",
    "OpCall",
    "backends",
    "copy_pages",
    "fast_compare_key",
    "gather_kv",
    "merge_states",
    "paged_attention",
    "register_backend",
    "store_kv",
    "unregister_backend",
]

reference.register()
cpu.register()
