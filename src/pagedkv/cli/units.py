"""Amounts of memory as people write and read them."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "parse_bytes"]

_FACTORS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_UNITS = {name.lower(): factor for name, factor in _FACTORS.items()}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes from "8GiB", "512 MB", "1.5G" (1024-based without the B) or a plain number.

    Raises: ValueError for anything else.
    """
    match = _AMOUNT.fullmatch(text)
    factor = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"memory must be a number with B, KiB, MiB, GiB, TiB, KB, MB, GB or TB, got {text!r}.")
    number = match.group(1)
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def format_bytes(num_bytes: int) -> str:
    """A short form with a binary unit: "45.0 KiB"; below 1 KiB the exact count.

    >>> format_bytes(46080)
    '45.0 KiB'
    """
    if num_bytes < 1024:
        return f"{num_bytes} B"
    amount = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if amount < 1024:
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} TiB"
