"""The rows of a batch as sequences of one manager, all of the same length."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...management.manager import KVCacheManager
from ...management.sequence import Sequence
from ...spec import KVCacheSpec
from ...storage.pool import KVPool

__all__ = ["CacheRows"]


class CacheRows:
    """The rows of the batch, and the slots of the tokens that the layers of one forward pass are at."""

    def __init__(self, spec: KVCacheSpec, num_pages: int, *, takes_dtype_of_keys: bool) -> None:
        self.manager: KVCacheManager | None = None
        self.seqs: list[Sequence] = []
        self.num_reserved = 0
        self._spec = spec
        self._num_pages = num_pages
        self._takes_dtype_of_keys = takes_dtype_of_keys
        self._slots: torch.Tensor | None = None

    def reserve(self, key: torch.Tensor, num_tokens: int) -> KVPool:
        """Makes room for `num_tokens` tokens in each row; the first layer of a pass does, the others find it."""
        if self.manager is None:
            spec = replace(self._spec, dtype=key.dtype) if self._takes_dtype_of_keys else self._spec
            self.manager = KVCacheManager(KVPool(spec, self._num_pages, key.device), prefix_cache=False)
        if not self.seqs:
            self.seqs = [self.manager.open(()) for _ in range(key.shape[0])]
        if key.shape[0] != len(self.seqs):
            raise ValueError(
                f"key_states must have a batch of {len(self.seqs)} (the cache's rows), got {key.shape[0]}."
            )
        if num_tokens > self.num_reserved:
            self._append(num_tokens - self.num_reserved)
        pool = self.manager.pool
        assert isinstance(pool, KVPool)  # made above
        return pool

    def slots(self, start: int, stop: int) -> torch.Tensor:
        """Slots of tokens [start, stop) of all rows, [B, stop - start] int64."""
        if self._slots is None:
            assert self.manager is not None  # rows exist
            table = self.manager.page_table(self.seqs)
            starts = torch.arange(len(self.seqs) + 1, device="cpu") * self.num_reserved
            self._slots = table.slot_mapping(starts.to(torch.int32)).view(len(self.seqs), -1)
        return self._slots[:, start:stop]

    def select(self, rows: list[int]) -> None:
        """The rows become copies of the named ones."""
        if self.manager is None or not self.seqs:
            return
        self.seqs = self.manager.reorder(self.seqs, rows)
        self._slots = None

    def truncate(self, num_tokens: int) -> None:
        """Forgets all but the first `num_tokens` tokens of each row."""
        for seq in self.seqs:
            seq.truncate(num_tokens)
        self.num_reserved = num_tokens
        self._slots = None

    def clear(self) -> None:
        """Forgets all rows and gives their pages back; the pool stays."""
        for seq in self.seqs:
            seq.close()
        self.seqs, self.num_reserved, self._slots = [], 0, None

    def fork(self) -> CacheRows:
        """The same rows once more, on the same pages of the same pool."""
        forked = CacheRows(self._spec, self._num_pages, takes_dtype_of_keys=self._takes_dtype_of_keys)
        forked.manager, forked.num_reserved = self.manager, self.num_reserved
        forked.seqs = [seq.fork() for seq in self.seqs]
        return forked

    def _append(self, num_tokens: int) -> None:
        """All rows or none."""
        done = []
        try:
            for seq in self.seqs:
                seq.append(num_tokens)
                done.append(seq)
        except BaseException:
            for seq in done:
                seq.truncate(self.num_reserved)
            raise
        self.num_reserved += num_tokens
        self._slots = None

    def __del__(self) -> None:
        # A fork (a deep copy of the cache) shares the manager, so its rows are given back when it goes.
        for seq in self.seqs:
            seq.close()
