"""One sequence of a model whose layers have different windows: a part in each group of layers, which go together."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy.typing as npt
import torch

from ..shapes import check_int
from .page_budget import PageBudget
from .prefix_cache import Namespace
from .sequence import Sequence, SequenceState
from .token_ids import TokenIds, as_token_array
from .whole_call import closing_call, reading_call, whole_call, within

__all__ = ["HybridSequence"]


class HybridSequence:
    """A growing list of tokens on pages of every group of layers; made by `HybridKVCacheManager.open` and `fork`.

    parts:  the `Sequence` of each group, in the order of the manager's groups: for inspection. They have the same
            tokens; what is done to one of them alone is undone by the next call of all.
    When:   as for a `Sequence`: append, write each layer's keys and values into the slots of its group, commit; close.
    Rule:   a call is made for all groups or, raising, for none.
    """

    def __init__(self, parts: tuple[Sequence, ...]) -> None:
        """For the manager."""
        self.parts = parts
        self._first = parts[0]
        self._budget: PageBudget = parts[0]._budget

    @property
    def num_tokens(self) -> int:
        """Tokens that have a slot in every group."""
        return min(part.num_tokens for part in self.parts)

    @property
    def num_committed(self) -> int:
        """Tokens whose ids are known."""
        return min(part.num_committed for part in self.parts)

    @property
    def num_cached_tokens(self) -> int:
        """Leading tokens that all groups had in the prefix cache when this sequence was opened, and still have."""
        return min(part.num_cached_tokens for part in self.parts)

    @property
    def page_ids(self) -> tuple[tuple[int, ...], ...]:
        """Its pages in each group; -1 where a window gave one back."""
        with self._budget.lock:
            return tuple(part.page_ids for part in self.parts)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the committed tokens; none once it is closed."""
        return self._first.token_ids[: self.num_committed]

    @property
    def namespace(self) -> Namespace:
        """With whom it shares cached pages."""
        return self._first.namespace

    @property
    def state(self) -> SequenceState:
        """Where its keys and values are: away when a part is."""
        return next((part.state for part in self.parts if part.state != "on pages"), "on pages")

    @property
    def is_closed(self) -> bool:
        """True once it gave its pages back for good."""
        return all(part.is_closed for part in self.parts)

    @whole_call
    def append(self, num_tokens: int) -> tuple[torch.Tensor, ...]:
        """Reserves the next tokens: the slots of each group, int64 [num_tokens] on the pool's device.

        Raises: OutOfPagesError when free and evictable pages are too few for all groups; nothing has changed then.
        """
        check_int("num_tokens", num_tokens, minimum=1)
        self._check_open("append")
        needed, kept_free = self._needs(num_tokens)
        shares = self._budget.obtain_shares(needed, kept_free)
        slots: list[torch.Tensor] = []
        start, is_new = self.num_tokens, bool(self._first._rows.is_new[self._first._row])
        try:
            for part, pages in zip(self.parts, shares, strict=True):
                slots.append(part._to_tensor(part._append(num_tokens, pages)))
        except Exception:  # a pool that does not copy
            for pages in shares[len(slots) + 1 :]:
                self._budget.allocator.free(pages)
            for part in self.parts[: len(slots)]:
                part._cut(start)
                part._rows.is_new[part._row] = is_new
            raise
        return tuple(slots)

    @whole_call
    def try_append(self, num_tokens: int) -> tuple[torch.Tensor, ...] | None:
        """The same, or None when there are too few pages."""
        if not within(HybridSequence.can_append, self, num_tokens):
            return None
        return within(HybridSequence.append, self, num_tokens)

    @reading_call
    def can_append(self, num_tokens: int) -> bool:
        """True when `append(num_tokens)` would find its pages now."""
        check_int("num_tokens", num_tokens, minimum=1)
        self._check_open("can_append")
        needed, kept_free = self._needs(num_tokens)
        return self._budget.can_obtain(sum(needed), kept_free)

    def commit(self, token_ids: TokenIds) -> None:
        """Names the reserved tokens, and publishes the pages that are full now; see `Sequence.commit`."""
        self._commit_ids(as_token_array("token_ids", token_ids))

    @whole_call
    def _commit_ids(self, ids: npt.NDArray[Any]) -> None:
        self._check_open("commit")
        new_ids = self._first._new_ids(ids)
        for part in self.parts:
            part._check_as_forks_committed(new_ids)
        for part in self.parts:
            part._commit(new_ids)

    @whole_call
    def fork(self) -> HybridSequence:
        """A second sequence with the same tokens on the same pages of every group; see `Sequence.fork`."""
        self._check_open("fork")
        return HybridSequence(tuple(within(Sequence.fork, part) for part in self.parts))

    @whole_call
    def truncate(self, num_tokens: int) -> None:
        """Forgets all tokens from `num_tokens` on, and gives back pages that held only those; see `Sequence.truncate`.

        Raises: ValueError when the tokens that are left would see pages that a window gave back.
        """
        check_int("num_tokens", num_tokens, minimum=0)
        self._check_open("truncate")
        # The first part to refuse has not been changed, and refuses for all: the longest window has the least left.
        for part in sorted(self.parts, key=lambda one: -one._shortest()):
            within(Sequence.truncate, part, num_tokens)

    @closing_call
    def close(self) -> None:
        """Gives the pages of all groups back: published ones stay cached. Idempotent."""
        for part in self.parts:
            within(Sequence.close, part)

    def __copy__(self) -> HybridSequence:
        raise TypeError("a sequence must be forked to have a second one, got a call of copy. Use fork().")

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a sequence must stay with its manager, got a call of pickle or deepcopy. Use fork().")

    def __enter__(self) -> HybridSequence:
        self._check_open("__enter__")
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = ", ".join(f"{part._num_pages} pages" if part.state == "on pages" else part.state for part in self.parts)
        return f"HybridSequence({self.num_tokens} tokens, {self.num_committed} committed, {where})"

    def _check_open(self, call: str) -> None:
        self._align()
        for part in self.parts:
            part._check_open(call)

    def _needs(self, num_tokens: int) -> tuple[list[int], int]:
        """Pages that so many more tokens take in each group, and how many must stay besides."""
        added = [part._pages_to_add(num_tokens) for part in self.parts]
        return [num_new + must_copy for num_new, must_copy in added], self._first._num_kept_free()

    def _align(self) -> None:
        """Makes the parts equal again when an interrupt ended a call between two of them: as long as the shortest, or
        dropped where one is away or the pages of its window are gone."""
        parts = self.parts
        if len({(part.num_tokens, part.num_committed, part.state) for part in parts}) == 1:
            return
        if any(part.is_closed for part in parts):
            for part in parts:
                within(Sequence.close, part)
            return
        is_equal = len({part.num_committed for part in parts}) == 1
        kept = min(part.num_tokens if is_equal else part.num_committed for part in parts)
        if any(part.state != "on pages" or kept < part._shortest() for part in parts):
            # What any of them knows is what was committed.
            longest = max(parts, key=lambda part: part.num_committed)
            ids = longest._rows.tokens.view(longest._row).copy()
            for part in parts:
                part._drop_to(part.num_committed)
                part._rows.put_tokens(part._row, 0, ids)
                part._rows.tokens.size[part._row] = part._rows.num_tokens[part._row] = ids.shape[0]
            return
        for part in parts:
            part._cut(kept)
