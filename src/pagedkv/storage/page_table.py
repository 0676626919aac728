"""Which pages each sequence of a batch reads, in order: CSR arrays, checked once when built."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch

from ..shapes import Shapes, check_device, check_dtype, check_int

__all__ = ["PageTable"]


class PageTable:
    """The pages of S sequences in CSR form; immutable, and valid once it exists.

    Shapes: indptr [S + 1] int32; indices [>= indptr[-1]] int32, entries beyond indptr[-1] are ignored;
            last_page_len [S] int32, the tokens in each sequence's last page: 1..page_size, 0 for no pages.
    Owns:   copies of the three tensors.
    Raises: TypeError for another index dtype (nothing is cast); ValueError for shapes or entries that break this.

    >>> table = PageTable.from_rows([[3, 7], [5]], seq_lens=[20, 4], page_size=16)
    >>> table.indptr.tolist(), table.indices.tolist(), table.last_page_len.tolist()
    ([0, 2, 3], [3, 7, 5], [4, 4])
    """

    __slots__ = ("_last_page_len", "_max_page", "_seq_lens", "indices", "indptr", "page_size")

    # None where nobody has asked for it yet.
    _last_page_len: torch.Tensor | None

    def __init__(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, *, page_size: int
    ) -> None:
        check_int("page_size", page_size, minimum=1)
        remedy = "Build it with PageTable.from_rows."
        for name, tensor in (("indptr", indptr), ("indices", indices), ("last_page_len", last_page_len)):
            check_dtype(f"{name} of the page table", tensor, torch.int32, remedy=remedy)
            check_device(f"{name} of the page table", tensor, indptr.device, "indptr")
        shapes = Shapes()
        shapes.check("last_page_len", last_page_len, "S")
        shapes.check("indices", indices, "I")
        if indptr.dim() != 1 or indptr.shape[0] != shapes["S"] + 1:
            raise ValueError(
                f"indptr must have shape [S + 1] with S = {shapes['S']} (set by last_page_len), "
                f"got {list(indptr.shape)}."
            )
        # Copies: what was checked stays as it was, whatever the caller does with its buffers in the next step.
        self.indptr, self.indices, last_page_len = (
            tensor.clone(memory_format=torch.contiguous_format) for tensor in (indptr, indices, last_page_len)
        )
        self.page_size = page_size
        self._last_page_len = last_page_len
        self._check_entries(last_page_len)

    def _check_entries(self, last_page_len: torch.Tensor) -> None:
        """One pass over host copies; sets the two values that are derived from the entries."""
        indptr, indices = self.indptr.cpu().numpy(), self.indices.cpu().numpy()
        last = last_page_len.cpu().numpy()
        if indptr[0] != 0:
            raise ValueError(f"indptr must start with 0, got {indptr[0]}.")
        num_pages = indptr[1:].astype("int64") - indptr[:-1]
        if num_pages.size and num_pages.min() < 0:
            row = int(num_pages.argmin())
            raise ValueError(f"indptr must not decrease, got {indptr[row]} then {indptr[row + 1]} at entry {row + 1}.")
        if indptr[-1] > indices.shape[0]:
            raise ValueError(f"indices must hold indptr[-1] = {indptr[-1]} entries, got {indices.shape[0]}.")
        empty = num_pages == 0
        bad = (empty & (last != 0)) | (~empty & ((last < 1) | (last > self.page_size)))
        if bad.any():
            row = int(bad.argmax())
            rule = "0 (it has no pages)" if empty[row] else f"in 1..{self.page_size} (page_size)"
            raise ValueError(f"last_page_len of sequence {row} must be {rule}, got {last[row]}.")
        used = indices[: indptr[-1]]
        if used.size and used.min() < 0:
            entry = int((used < 0).argmax())
            raise ValueError(f"indices must hold page ids of 0 or more, got {used[entry]} at entry {entry}.")
        self._max_page = int(used.max()) if used.size else -1
        # 64 bits: a page count times a page size may pass 2^31.
        seq_lens = (num_pages - 1) * self.page_size + last
        seq_lens[empty] = 0
        if seq_lens.size and seq_lens.max() > 2**31 - 1:
            raise ValueError(f"sequence lengths must be below 2**31 tokens, got {seq_lens.max()}.")
        self._seq_lens = torch.from_numpy(seq_lens.astype("int32")).to(self.indptr.device)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Iterable[int]],
        seq_lens: Sequence[int],
        page_size: int,
        *,
        device: torch.device | str | None = None,
    ) -> PageTable:
        """Builds a table from one list of page ids a sequence; spare pages at a row's end are dropped.

        Raises: ValueError when a row has fewer pages than its length needs.
        """
        check_int("page_size", page_size, minimum=1)
        if len(rows) != len(seq_lens):
            raise ValueError(f"seq_lens must have one entry a row, got {len(seq_lens)} for {len(rows)} rows.")
        indices: list[int] = []
        indptr, last = [0], []
        for number, (row, seq_len) in enumerate(zip(rows, seq_lens, strict=True)):
            seq_len = operator.index(seq_len)
            needed = _pages_needed(number, seq_len, page_size)
            pages = [operator.index(page) for page in list(row)[:needed]]
            if len(pages) < needed:
                raise ValueError(
                    f"row {number} must have {needed} pages for {seq_len} tokens (page_size {page_size}), "
                    f"got {len(pages)}."
                )
            if pages and max(pages) >= 2**31:
                raise ValueError(f"row {number} must hold page ids below 2**31, got {max(pages)}.")
            indices.extend(pages)
            indptr.append(len(indices))
            last.append(seq_len - (needed - 1) * page_size if needed else 0)
        return cls(
            torch.tensor(indptr, dtype=torch.int32, device=device),
            torch.tensor(indices, dtype=torch.int32, device=device),
            torch.tensor(last, dtype=torch.int32, device=device),
            page_size=page_size,
        )

    @classmethod
    def from_dense(cls, dense: torch.Tensor, seq_lens: torch.Tensor, page_size: int) -> PageTable:
        """Builds a table from rows padded with -1.

        Shapes: dense [S, M] int32, -1 unused; seq_lens [S] int32.
        """
        check_int("page_size", page_size, minimum=1)
        check_dtype("dense", dense, torch.int32)
        check_dtype("seq_lens", seq_lens, torch.int32)
        shapes = Shapes()
        shapes.check("dense", dense, "S M")
        shapes.check("seq_lens", seq_lens, "S")
        lengths = seq_lens.tolist()
        for row, seq_len in enumerate(lengths):
            needed = _pages_needed(row, seq_len, page_size)
            if needed > shapes["M"]:
                raise ValueError(
                    f"dense must have {needed} columns for the {seq_len} tokens of row {row}, got {shapes['M']}."
                )
        return cls.from_rows(dense.tolist(), lengths, page_size, device=dense.device)

    @property
    def num_seqs(self) -> int:
        """S, the sequences of the batch."""
        return self.indptr.shape[0] - 1

    @property
    def last_page_len(self) -> torch.Tensor:
        """Tokens in the last page of each sequence, [S] int32: 1..page_size, 0 for no pages."""
        if self._last_page_len is None:
            num_pages = self.indptr[1:] - self.indptr[:-1]
            # A sequence without pages has no tokens either.
            self._last_page_len = self._seq_lens - (num_pages - 1).clamp(min=0) * self.page_size
        return self._last_page_len

    @property
    def max_page(self) -> int:
        """The largest page id named, -1 for none: what a pool must exceed."""
        return self._max_page

    @property
    def seq_lens(self) -> torch.Tensor:
        """Tokens of each sequence, [S] int32, a copy."""
        return self._seq_lens.clone()

    def to_dense(self) -> torch.Tensor:
        """[S, M] int32 with -1 in unused columns; M is the longest row."""
        counts = (self.indptr[1:] - self.indptr[:-1]).tolist()
        dense = torch.full((self.num_seqs, max(counts, default=0)), -1, dtype=torch.int32, device=self.indices.device)
        start = 0
        for row, count in enumerate(counts):
            dense[row, :count] = self.indices[start : start + count]
            start += count
        return dense

    def slot_mapping(self, query_indptr: torch.Tensor) -> torch.Tensor:
        """The slots of the last q_len tokens of each sequence, packed: [T] int64.

        Shapes: query_indptr [S + 1] int32, T = query_indptr[-1].
        When:   the table already includes the new tokens.
        Raises: ValueError when a sequence has fewer tokens than its q_len.
        """
        self.check_query_indptr(query_indptr)
        query_lens = query_indptr[1:] - query_indptr[:-1]
        too_long = query_lens > self._seq_lens
        if bool(too_long.any()):
            row = int(too_long.int().argmax())
            raise ValueError(
                f"query_indptr must give sequence {row} between 0 and {int(self._seq_lens[row])} (its length) new "
                f"tokens, got {int(query_lens[row])}."
            )
        rows = torch.repeat_interleave(torch.arange(self.num_seqs, device=query_lens.device), query_lens)
        num_tokens = rows.shape[0]
        positions = (
            torch.arange(num_tokens, device=query_lens.device)
            - query_indptr[:-1][rows]
            + (self._seq_lens - query_lens)[rows].to(torch.int64)
        )
        pages = self.indices[self.indptr[:-1][rows].to(torch.int64) + positions // self.page_size].to(torch.int64)
        return pages * self.page_size + positions % self.page_size

    def check_query_indptr(self, query_indptr: torch.Tensor) -> int:
        """Refuses what does not divide T packed new tokens among the sequences of this table; returns T."""
        check_dtype("query_indptr", query_indptr, torch.int32)
        check_device("query_indptr", query_indptr, self.indptr.device, "the page table")
        if query_indptr.dim() != 1 or query_indptr.shape[0] != self.num_seqs + 1:
            raise ValueError(
                f"query_indptr must have shape [S + 1] with S = {self.num_seqs} (set by the page table), "
                f"got {list(query_indptr.shape)}."
            )
        starts = (query_indptr if query_indptr.is_cpu else query_indptr.cpu()).numpy()
        if starts[0] != 0 or (starts[1:] < starts[:-1]).any():
            raise ValueError(f"query_indptr must start with 0 and not decrease, got {starts[:8].tolist()}.")
        return int(starts[-1])

    def __repr__(self) -> str:
        return f"PageTable(num_seqs={self.num_seqs}, num_pages={int(self.indptr[-1])}, page_size={self.page_size})"


def _pages_needed(row: int, seq_len: int, page_size: int) -> int:
    if seq_len < 0:
        raise ValueError(f"seq_lens must be 0 or more, got {seq_len} for row {row}.")
    return -(-seq_len // page_size)
