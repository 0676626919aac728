"""rope_store_kv: turned in torch, stored by the native core."""

from __future__ import annotations

from typing import Any

from .. import reference
from .store_kv import store_kv

__all__ = ["rope_store_kv"]


def rope_store_kv(*call: Any) -> None:
    """As in plain torch, but for the store; the core checks the slots before it writes."""
    reference.rope_store_kv(*call, store=store_kv)
