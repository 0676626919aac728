"""InfiniOP's paged-cache operators on pages of any device: `from pagedkv.integrations import infiniop`.

Each operator is a descriptor (create, workspace size, calculate, destroy) and a function that does all of it at once.
Arguments come in the operator library's order, results first, and errors carry its status codes. What is covered and
what differs on purpose is listed in docs/infiniop.md.
"""

from __future__ import annotations

from .enumerations import InfiniDevice, InfiniDtype
from .handle import Handle
from .kv_caching import KvCachingDescriptor, kv_caching
from .paged_attention import PagedAttentionDescriptor, paged_attention
from .paged_attention_prefill import PagedAttentionPrefillDescriptor, paged_attention_prefill
from .paged_caching import PagedCachingDescriptor, paged_caching
from .slots import slots_of
from .status import InfiniopError, InfiniStatus, call_status
from .tensor_descriptor import TensorDescriptor

__all__ = [
    "Handle",
    "InfiniDevice",
    "InfiniDtype",
    "InfiniStatus",
    "InfiniopError",
    "KvCachingDescriptor",
    "PagedAttentionDescriptor",
    "PagedAttentionPrefillDescriptor",
    "PagedCachingDescriptor",
    "TensorDescriptor",
    "call_status",
    "kv_caching",
    "paged_attention",
    "paged_attention_prefill",
    "paged_caching",
    "slots_of",
]
