"""Who owns which page: allocation, the prefix cache, sequences, and the proof that the books agree."""

from __future__ import annotations

from .allocator import PageAllocator
from .eviction import CachedRun, EvictionPolicy, LRUPolicy, eviction_policies, register_eviction_policy
from .integrity import check_integrity
from .manager import KVCacheManager
from .radix_cache import CacheHandle, InsertResult, MatchResult, RadixCache
from .sequence import Sequence
from .stats import ManagerStats

__all__ = [
    "CacheHandle",
    "CachedRun",
    "EvictionPolicy",
    "InsertResult",
    "KVCacheManager",
    "LRUPolicy",
    "ManagerStats",
    "MatchResult",
    "PageAllocator",
    "RadixCache",
    "Sequence",
    "check_integrity",
    "eviction_policies",
    "register_eviction_policy",
]
