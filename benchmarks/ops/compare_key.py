"""fast_compare_key of equal prefixes, beside one numpy comparison of everything."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

import pagedkv

from ..case import OURS, Case, CaseSpec, Options, WrongResultError

__all__ = ["cases"]

# Tokens in each key, and where they differ.
_KEYS = ((16, 15), (256, 255), (4096, 4095), (65536, 65535), (65536, 10))


def cases(options: Options) -> Iterator[CaseSpec]:
    """Keys that differ at the end, and long ones that differ early."""
    for num_tokens, difference in _KEYS[:2] if options.quick else _KEYS:
        yield CaseSpec("compare_key", f"n{num_tokens}-differs{difference}", partial(_build, num_tokens, difference))


def _build(num_tokens: int, difference: int) -> Case:
    a = np.arange(num_tokens)
    b = a.copy()
    b[difference] += 1
    repeats = 1000 if num_tokens <= 4096 else 50

    def ours(i: int) -> int:
        return [pagedkv.fast_compare_key(a, b) for _ in range(repeats)][-1]

    def whole(i: int) -> int:
        return [int((a != b).argmax()) for _ in range(repeats)][-1]

    def check() -> None:
        if ours(0) != difference:
            raise WrongResultError(f"{ours(0)} equal tokens found, {difference} are")

    contenders = {OURS: ours, "numpy, all at once": whole}
    return Case(contenders, check, num_bytes=16 * (difference + 1), repeats=repeats)
