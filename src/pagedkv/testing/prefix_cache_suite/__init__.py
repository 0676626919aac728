"""What every prefix cache must do, as named cases that its author runs: the radix tree, the hashed pages, or one's own.

>>> from pagedkv import RadixCache
>>> for case in prefix_cache_cases(page_sizes=[2]):
...     case(RadixCache)
"""

from __future__ import annotations

from collections.abc import Iterable

from .case import Check, MakeCache, PrefixCacheCase
from .event_cases import EVENT_CHECKS
from .eviction_cases import EVICTION_CHECKS
from .lock_cases import LOCK_CHECKS
from .lookup_cases import LOOKUP_CHECKS
from .refusal_cases import REFUSAL_CHECKS
from .trace_cases import TRACE_CHECKS

__all__ = ["MakeCache", "PrefixCacheCase", "prefix_cache_cases"]

PAGE_SIZES = (1, 2, 16, 256)


def prefix_cache_cases(page_sizes: Iterable[int] = PAGE_SIZES) -> list[PrefixCacheCase]:
    """All cases at each page size.

    A case is called with what makes a cache, `make(page_size, **options)`: a class will do. Its string is its id:
    `@pytest.mark.parametrize("case", prefix_cache_cases(), ids=str)`.
    """
    checks: list[Check] = [
        *LOOKUP_CHECKS, *LOCK_CHECKS, *EVICTION_CHECKS, *EVENT_CHECKS, *REFUSAL_CHECKS, *TRACE_CHECKS
    ]  # fmt: skip
    return [PrefixCacheCase(_name(check), page_size, check) for page_size in page_sizes for check in checks]


def _name(check: Check) -> str:
    return getattr(check, "__name__", str(check)).strip("_").replace("_", "-")
