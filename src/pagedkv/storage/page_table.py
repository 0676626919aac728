"""Which pages each sequence of a batch reads, in order: CSR arrays, checked once when built."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..kernels.upload import uploaded, uploaded_together
from ..shapes import Shapes, check_device, check_dtype, check_int

__all__ = ["HostTable", "PageTable"]

_Ints = npt.NDArray[np.int32]


class HostTable(NamedTuple):
    """The arrays of a page table in main memory, wherever its tensors are: for reading."""

    indptr: _Ints
    indices: _Ints
    seq_lens: _Ints


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

    __slots__ = (
        "_host",
        "_last_page_len",
        "_longest",
        "_max_page",
        "_query",
        "_seq_lens",
        "indices",
        "indptr",
        "page_size",
    )

    # None where nobody has asked for them yet.
    _last_page_len: torch.Tensor | None
    _longest: int | None
    # A division of new tokens whose copy on the host is known, and that copy.
    _query: tuple[torch.Tensor, _Ints] | None

    def __init__(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, *, page_size: int
    ) -> None:
        _check_page_size(page_size)
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
        self._query = None
        indptr, indices, last_page_len = _on_host(self.indptr, self.indices, last_page_len)
        seq_lens = self._checked_lengths(indptr.numpy(), indices.numpy(), last_page_len.numpy())
        self._host = HostTable(indptr.numpy(), indices.numpy(), seq_lens)
        (self._seq_lens,) = uploaded_together([seq_lens], self.indptr.device)

    def _checked_lengths(self, indptr: _Ints, indices: _Ints, last: _Ints) -> _Ints:
        """One pass over host copies; sets the two numbers that are derived from the entries, returns the lengths."""
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
        self._longest = int(seq_lens.max()) if seq_lens.size else 0
        if self._longest > 2**31 - 1:
            raise ValueError(f"sequence lengths must be below 2**31 tokens, got {self._longest}.")
        lengths: _Ints = seq_lens.astype(np.int32)
        return lengths

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
        _check_page_size(page_size)
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
        csr = (torch.tensor(entries, dtype=torch.int32, device="cpu") for entries in (indptr, indices, last))
        return cls(*csr, page_size=page_size).to(torch.get_default_device() if device is None else device)

    @classmethod
    def from_dense(cls, dense: torch.Tensor, seq_lens: torch.Tensor, page_size: int) -> PageTable:
        """Builds a table from rows padded with -1.

        Shapes: dense [S, M] int32, -1 unused; seq_lens [S] int32.
        """
        _check_page_size(page_size)
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

    def to(self, device: torch.device | str) -> PageTable:
        """The table on a device, itself if it is there; nothing is read back, and no copy to a GPU is waited for."""
        # "cuda" is the current one: tensors say which.
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        table = PageTable.__new__(PageTable)
        table.indptr, table.indices, table._seq_lens = uploaded_together(self._host, device)
        table._host, table.page_size, table._max_page = self._host, self.page_size, self._max_page
        table._last_page_len = table._query = None
        table._longest = self._longest
        return table

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
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, 0 for no sequences."""
        if self._longest is None:
            lengths = self._host.seq_lens
            self._longest = int(lengths.max()) if lengths.size else 0
        return self._longest

    @property
    def seq_lens(self) -> torch.Tensor:
        """Tokens of each sequence, [S] int32, a copy."""
        return self._seq_lens.clone()

    @property
    def kept_seq_lens(self) -> torch.Tensor:
        """`seq_lens` itself, for reading."""
        return self._seq_lens

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.indptr.device

    @property
    def host(self) -> HostTable:
        """indptr, indices and the lengths as arrays in main memory, which nothing is read back for."""
        return self._host

    def to_dense(self) -> torch.Tensor:
        """[S, M] int32 with -1 in unused columns; M is the longest row."""
        indptr, indices, _ = self._host
        counts = np.diff(indptr).tolist()
        dense = np.full((self.num_seqs, max(counts, default=0)), -1, np.int32)
        start = 0
        for row, count in enumerate(counts):
            dense[row, :count] = indices[start : start + count]
            start += count
        (there,) = uploaded_together([dense], self.device)
        return there

    def slot_mapping(self, query_indptr: torch.Tensor) -> torch.Tensor:
        """The slots of the last q_len tokens of each sequence, packed: [T] int64.

        Shapes: query_indptr [S + 1] int32, T = query_indptr[-1], on the table's device or on the CPU.
        When:   the table already includes the new tokens.
        Raises: ValueError when a sequence has fewer tokens than its q_len.
        """
        starts = self.host_query_indptr(query_indptr, may_be_on_cpu=True)
        indptr, indices, seq_lens = self._host
        query_lens = np.diff(starts)
        too_long = query_lens > seq_lens
        if too_long.any():
            row = int(too_long.argmax())
            raise ValueError(
                f"query_indptr must give sequence {row} between 0 and {seq_lens[row]} (its length) new tokens, "
                f"got {query_lens[row]}."
            )
        first = seq_lens.astype(np.int64) - query_lens - starts[:-1]
        positions = np.repeat(first, query_lens) + np.arange(int(starts[-1]))
        entries = np.repeat(indptr[:-1].astype(np.int64), query_lens) + positions // self.page_size
        slots = indices[entries].astype(np.int64) * self.page_size + positions % self.page_size
        return uploaded(slots, self.device)

    def check_query_indptr(self, query_indptr: torch.Tensor) -> int:
        """Refuses what does not divide T packed new tokens among the sequences of this table; returns T."""
        return int(self.host_query_indptr(query_indptr)[-1])

    def host_query_indptr(self, query_indptr: torch.Tensor, *, may_be_on_cpu: bool = False) -> npt.NDArray[np.int32]:
        """The same check; returns what it holds, in main memory, read back only where the table does not know it.

        may_be_on_cpu: whether it may be there though the table is on another device.
        """
        check_dtype("query_indptr", query_indptr, torch.int32)
        if not (may_be_on_cpu and query_indptr.is_cpu):
            check_device("query_indptr", query_indptr, self.indptr.device, "the page table")
        if query_indptr.dim() != 1 or query_indptr.shape[0] != self.num_seqs + 1:
            raise ValueError(
                f"query_indptr must have shape [S + 1] with S = {self.num_seqs} (set by the page table), "
                f"got {list(query_indptr.shape)}."
            )
        if self._query is not None and query_indptr is self._query[0]:
            return self._query[1]
        starts: _Ints = (query_indptr if query_indptr.is_cpu else query_indptr.cpu()).numpy()
        if starts[0] != 0 or (starts[1:] < starts[:-1]).any():
            raise ValueError(f"query_indptr must start with 0 and not decrease, got {starts[:8].tolist()}.")
        return starts

    def know_query_indptr(self, query_indptr: torch.Tensor, on_host: npt.NDArray[np.int32]) -> None:
        """Has the checks take `on_host` [S + 1] for what this very tensor holds, which is right and stays so."""
        self._query = query_indptr, on_host

    def __repr__(self) -> str:
        return f"PageTable(num_seqs={self.num_seqs}, num_pages={self._host.indptr[-1]}, page_size={self.page_size})"


def _on_host(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """One-dimensional tensors of one dtype on the CPU; from another device in one copy that is waited for once."""
    if tensors[0].is_cpu:
        return tensors
    return torch.split(torch.cat(tensors).cpu(), [tensor.shape[0] for tensor in tensors])


def _check_page_size(page_size: int) -> None:
    check_int("page_size", page_size, minimum=1)
    # Slots, which are page * page_size + offset, then fit in 64 bits.
    if page_size >= 2**31:
        raise ValueError(f"page_size must be below 2**31, got {page_size}.")


def _pages_needed(row: int, seq_len: int, page_size: int) -> int:
    if seq_len < 0:
        raise ValueError(f"seq_lens must be 0 or more, got {seq_len} for row {row}.")
    return -(-seq_len // page_size)
