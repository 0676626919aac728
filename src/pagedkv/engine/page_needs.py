"""How many pages a request needs, when its continuations share those of the tokens they have in common."""

from __future__ import annotations

from ..management.sequence import Sequence
from .request import Request

__all__ = ["longest_answer", "num_pages_in_all", "num_pages_to_come"]


def longest_answer(num_prompt_tokens: int, num_continuations: int, num_pages: int, page_size: int) -> int:
    """New tokens that each continuation can have when the request has the whole pool; at least 1.

    Full pages of the prompt are there once, all others once a continuation. The last new token is never computed.

    >>> longest_answer(5, 1, num_pages=3, page_size=4), longest_answer(5, 2, num_pages=3, page_size=4)
    (8, 4)
    """
    num_shared = num_prompt_tokens // page_size
    num_tokens = (num_shared + (num_pages - num_shared) // num_continuations) * page_size
    return max(num_tokens - num_prompt_tokens + 1, 1)


def num_pages_in_all(request: Request, page_size: int) -> int:
    """Pages of a request that is admitted now, once all its tokens are computed."""
    num_shared, lengths = request.num_shared, [len(continuation.ids) for continuation in request.live]
    if len(lengths) == 1:
        return -(-lengths[0] // page_size)
    num_full = num_shared // page_size
    own = [-(-length // page_size) - num_full for length in lengths if length > num_shared]
    # A partly filled page of what is shared is kept by one continuation; the others copy it before they write.
    is_kept = num_shared % page_size > 0 and len(own) < len(lengths)
    return num_full + is_kept + sum(own)


def num_pages_to_come(request: Request, page_size: int) -> int:
    """Pages that a running request still needs for the tokens it has, and one for each continuation to grow."""
    live = request.live
    if request.followers:
        trunk = live[0].seq
        return max(num_pages_in_all(request, page_size) - _num_pages_of(trunk, page_size), 0) + len(live)
    return sum(
        max(-(-len(continuation.ids) // page_size) - _num_pages_of(continuation.seq, page_size), 0) + 1
        for continuation in live
    )


def _num_pages_of(seq: Sequence | None, page_size: int) -> int:
    return 0 if seq is None else -(-seq.num_tokens // page_size)
