"""What calls of a manager are given, checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..shapes import check_int
from .ledger import PageLedger
from .sequence import Sequence
from .token_ids import TokenIds, as_token_ids

__all__ = [
    "check_known",
    "check_on_pages",
    "check_window",
    "checked_batch",
    "checked_beams",
    "checked_counts",
    "checked_parents",
]


def check_window(window: int | None) -> None:
    """Refuses what is neither None nor a count of tokens."""
    if window is None:
        return
    check_int("window", window, minimum=1)
    if window >= 2**31:
        raise ValueError(f"window must be below 2**31, got {window}. Leave it out to see all tokens.")


def check_known(ledger: PageLedger, name: str, seqs: list[Sequence]) -> None:
    """Refuses what is no sequence, and open ones of another manager."""
    for number, seq in enumerate(seqs):
        if not isinstance(seq, Sequence):
            raise TypeError(f"{name} must be sequences, got {type(seq).__name__} at position {number}.")
        if not seq.is_closed and seq._ledger is not ledger:
            raise ValueError(f"{name} must be sequences of this manager, got another's at position {number}.")


def check_on_pages(ledger: PageLedger, name: str, seqs: list[Sequence], call: str) -> None:
    """Refuses also what is closed or away."""
    if all(type(seq) is Sequence and seq._ledger is ledger and seq._state == "on pages" for seq in seqs):
        return
    check_known(ledger, name, seqs)
    for number, seq in enumerate(seqs):
        if seq.is_closed:
            raise ValueError(f"{name} must be open sequences for {call}, got a closed one at position {number}.")
        if seq.state != "on pages":
            raise ValueError(
                f"{name} must be on pages for {call}, got one that is {seq.state} at position {number}. "
                "Swap it in first."
            )


def checked_batch(
    ledger: PageLedger, seqs: Iterable[Sequence], num_tokens: int | TokenIds
) -> tuple[list[Sequence], int | npt.NDArray[np.int64]]:
    """The sequences as a list, and the new tokens of all or of each."""
    rows = seqs if isinstance(seqs, list) else list(seqs)
    # More than all slots is as good as one too many, and adds up without an overflow.
    return rows, checked_counts(len(rows), num_tokens, ledger.allocator.num_pages * ledger.page_size + 1)


def checked_counts(num_seqs: int, num_tokens: int | TokenIds, most: int) -> int | npt.NDArray[np.int64]:
    """New tokens of all sequences or of each, at most `most`."""
    if isinstance(num_tokens, int):
        check_int("num_tokens", num_tokens, minimum=1)
        return min(num_tokens, most)
    counts = as_token_ids("num_tokens", num_tokens)
    if counts.shape[0] != num_seqs:
        raise ValueError(f"num_tokens must be an int or have shape [{num_seqs}], got [{counts.shape[0]}].")
    if counts.size and not counts.all():
        raise ValueError(f"num_tokens must be at least 1, got 0 at position {int((counts == 0).argmax())}.")
    return np.minimum(counts, most)


def checked_beams(ledger: PageLedger, beams: Iterable[Sequence], parents: TokenIds) -> tuple[list[Sequence], list[int]]:
    """Different sequences that are on pages, and numbers of them."""
    rows = list(beams)
    check_on_pages(ledger, "beams", rows, "reorder")
    if len({id(beam) for beam in rows}) != len(rows):
        raise ValueError("beams must be different sequences, got one twice. Fork it first.")
    return rows, checked_parents(len(rows), parents)


def checked_parents(num_beams: int, parents: TokenIds) -> list[int]:
    """Numbers of beams."""
    chosen: list[int] = as_token_ids("parents", parents).tolist()
    for position, parent in enumerate(chosen):
        if parent >= num_beams:
            raise ValueError(f"parents must be in 0..{num_beams - 1}, got {parent} at position {position}.")
    return chosen
