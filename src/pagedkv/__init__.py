"""The paged KV cache of LLM inference: pages of keys and values, who owns them, and attention through the page table.

`import pagedkv` touches no device, starts no thread and writes no file.
"""

from __future__ import annotations

from .attention import plan_attention
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
    backends,
    copy_pages,
    fast_compare_key,
    gather_kv,
    merge_states,
    paged_attention,
    register_backend,
    store_kv,
)
from .management import (
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
from .storage import KVPool, PageTable

__version__ = "0.1.0"

__all__ = [
    "AttentionPlan",
    "AttentionState",
    "BackendUnavailableError",
    "CorruptPageError",
    "InsertResult",
    "IntegrityError",
    "KVCacheManager",
    "KVCacheSpec",
    "KVPool",
    "MLACacheSpec",
    "ManagerStats",
    "MatchResult",
    "OutOfPagesError",
    "PageAllocator",
    "PageTable",
    "PagedKVError",
    "RadixCache",
    "Sequence",
    "TierError",
    "TierUnavailableError",
    "backends",
    "calc_kv_cache_memory",
    "check_integrity",
    "copy_pages",
    "fast_compare_key",
    "gather_kv",
    "merge_states",
    "paged_attention",
    "plan_attention",
    "register_backend",
    "store_kv",
]
