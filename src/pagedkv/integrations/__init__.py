"""Other people's models and interfaces on top of the paged cache; imported by name, with the extra that one needs."""

from __future__ import annotations

__all__: list[str] = []
