"""Functions on tensors, each behind a table of back ends; they know nothing of sequences or tiers."""

from __future__ import annotations

from . import cpu, reference, triton
from .attention_plan import AttentionPlan
from .backend import BackendStatus, OpCall, backends, register_backend, unregister_backend
from .compare_key import fast_compare_key
from .copy_pages import copy_pages
from .exp_table import ExpTable
from .gather_kv import gather_kv
from .merge_states import AttentionState, merge_states
from .mla_attention import mla_attention
from .paged_attention import AttentionOptions, paged_attention
from .quantize import QuantizedKV, dequantize_kv, quantize_kv
from .rope import Llama31Scaling, RotaryEmbedding, apply_rope, cos_sin_table
from .rope_store_kv import rope_store_kv
from .store_kv import store_kv
from .store_mla import store_mla

__all__ = [
    "AttentionOptions",
    "AttentionPlan",
    "AttentionState",
    "BackendStatus",
    "ExpTable",
    "Llama31Scaling",
    "OpCall",
    "QuantizedKV",
    "RotaryEmbedding",
    "apply_rope",
    "backends",
    "copy_pages",
    "cos_sin_table",
    "dequantize_kv",
    "fast_compare_key",
    "gather_kv",
    "merge_states",
    "mla_attention",
    "paged_attention",
    "quantize_kv",
    "register_backend",
    "rope_store_kv",
    "store_kv",
    "store_mla",
    "unregister_backend",
]

reference.register()
cpu.register()
triton.register()
