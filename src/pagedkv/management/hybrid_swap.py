"""Takes the pages of all parts of a hybrid sequence away and gives them others, of all parts or of none."""

from __future__ import annotations

from typing import Any

from .sequence import Sequence
from .swap_tier import SwapTier

__all__ = ["swap_in_parts", "swap_out_parts"]


def swap_out_parts(parts: tuple[Sequence, ...], tier: SwapTier) -> None:
    """Saves all pages of all parts, then gives them back. What the tier raises leaves everything as it was."""
    tickets: list[Any] = []
    for part in parts:
        part._drop_ticket()
    try:
        for part in parts:
            tickets.append(part._save_pages(tier))
    except Exception:
        for ticket in tickets:
            tier.drop(ticket)
        raise
    for part, ticket in zip(parts, tickets, strict=True):
        part._put_away("swapped out", (tier, ticket))


def swap_in_parts(parts: tuple[Sequence, ...]) -> None:
    """Loads all pages of all parts; when one cannot be, those before it go away again, their copies still saved."""
    loaded: list[Sequence] = []
    try:
        for part in parts:
            part._load_pages()
            loaded.append(part)
    except Exception:
        for part in loaded:
            part._put_away("swapped out", part._ticket)
        raise
    for part in parts:
        part._finish_load()
