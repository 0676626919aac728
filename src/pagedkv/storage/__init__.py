"""Where the bytes of pages are, and the tables that name them."""

from __future__ import annotations

from .page_table import PageTable
from .pool import KVPool

__all__ = ["KVPool", "PageTable"]
