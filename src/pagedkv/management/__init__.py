"""Who owns which page: allocation, prefix caches, sequences, and the proof that the books agree."""

from __future__ import annotations

from .allocator import PageAllocator
from .events import AllBlocksCleared, BlockRemoved, BlockStored, EventLog
from .eviction import (
    CachedRun,
    EvictionPolicy,
    FIFOPolicy,
    FILOPolicy,
    LFUPolicy,
    LRUPolicy,
    MRUPolicy,
    PriorityPolicy,
    SLRUPolicy,
    eviction_policies,
    register_eviction_policy,
)
from .hashed_cache import HashedPageCache
from .hybrid_manager import HybridKVCacheManager
from .hybrid_sequence import HybridSequence
from .hybrid_step import HybridStepBatch
from .integrity import check_integrity
from .manager import KVCacheManager
from .pinned import PinnedPrefix
from .prefix_cache import CacheHandle, InsertResult, MatchResult, PrefixCache
from .radix_cache import RadixCache
from .sequence import Sequence
from .stats import ManagerStats
from .step_batch import StepBatch

__all__ = [
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "CacheHandle",
    "CachedRun",
    "EventLog",
    "EvictionPolicy",
    "FIFOPolicy",
    "FILOPolicy",
    "HashedPageCache",
    "HybridKVCacheManager",
    "HybridSequence",
    "HybridStepBatch",
    "InsertResult",
    "KVCacheManager",
    "LFUPolicy",
    "LRUPolicy",
    "MRUPolicy",
    "ManagerStats",
    "MatchResult",
    "PageAllocator",
    "PinnedPrefix",
    "PrefixCache",
    "PriorityPolicy",
    "RadixCache",
    "SLRUPolicy",
    "Sequence",
    "StepBatch",
    "check_integrity",
    "eviction_policies",
    "register_eviction_policy",
]
