"""Other people's models and interfaces on top of the paged cache; each needs its own extra and is imported by name."""

from __future__ import annotations

__all__: list[str] = []
