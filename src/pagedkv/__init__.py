"""The paged KV cache of LLM inference: pages of keys and values, who owns them, and attention through the page table.

`import pagedkv` touches no device, starts no thread and writes no file.
"""

from __future__ import annotations

from .attention import cascade_attention, plan_attention, tile_attention
from .errors import (
    BackendUnavailableError,
    CorruptPageError,
    IntegrityError,
    OutOfPagesError,
    PagedKVError,
    TierError,
    TierUnavailableError,
)
from .kernels import (
    AttentionPlan,
    AttentionState,
    ExpTable,
    Llama31Scaling,
    QuantizedKV,
    RotaryEmbedding,
    apply_rope,
    backends,
    copy_pages,
    dequantize_kv,
    fast_compare_key,
    gather_kv,
    merge_states,
    mla_attention,
    paged_attention,
    quantize_kv,
    register_backend,
    store_kv,
    store_mla,
)
from .management import (
    HashedPageCache,
    InsertResult,
    KVCacheManager,
    ManagerStats,
    MatchResult,
    PageAllocator,
    RadixCache,
    Sequence,
    check_integrity,
)
from .spec import KVCacheSpec, MLACacheSpec, calc_kv_cache_memory
from .storage import HostPageStore, HostTileCache, KVPool, MLAPool, PageTable, TileCache, TileKey, TilePageTable

__version__ = "0.1.0"

__all__ = [
    "AttentionPlan",
    "AttentionState",
    "BackendUnavailableError",
    "CorruptPageError",
    "ExpTable",
    "HashedPageCache",
    "HostPageStore",
    "HostTileCache",
    "InsertResult",
    "IntegrityError",
    "KVCacheManager",
    "KVCacheSpec",
    "KVPool",
    "Llama31Scaling",
    "MLACacheSpec",
    "MLAPool",
    "ManagerStats",
    "MatchResult",
    "OutOfPagesError",
    "PageAllocator",
    "PageTable",
    "PagedKVError",
    "QuantizedKV",
    "RadixCache",
    "RotaryEmbedding",
    "Sequence",
    "TierError",
    "TierUnavailableError",
    "TileCache",
    "TileKey",
    "TilePageTable",
    "apply_rope",
    "backends",
    "calc_kv_cache_memory",
    "cascade_attention",
    "check_integrity",
    "copy_pages",
    "dequantize_kv",
    "fast_compare_key",
    "gather_kv",
    "merge_states",
    "mla_attention",
    "paged_attention",
    "plan_attention",
    "quantize_kv",
    "register_backend",
    "store_kv",
    "store_mla",
    "tile_attention",
]
