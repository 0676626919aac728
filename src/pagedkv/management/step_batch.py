"""What a step over many sequences needs: slots, page table and plan inputs, as tensors."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..kernels.upload import uploaded, uploaded_together
from ..storage.page_table import HostTable, PageTable
from .allocator import PageArray
from .row_heap import RowSnapshot

__all__ = ["BookedTable", "StepBatch", "StepTables"]


class StepTables(Protocol):
    """What keeps the page table from step to step."""

    @property
    def table_version(self) -> int:
        """Differs after every change of the table."""

    def dense_table(self) -> torch.Tensor:
        """The dense form for the last step."""

    def csr_table(self, snapshot: RowSnapshot, lengths: npt.NDArray[np.int64]) -> PageTable:
        """The CSR form of any step."""


class StepBatch:
    """The reservation of one step, packed by sequence in the order they were given.

    slot_mapping: [T] int64, where the new keys and values go: `store_kv`.
    query_indptr: [S + 1] int32, which of the T new tokens are each sequence's: `plan_attention`.
    Cost: each form of the page table is made when it is asked for, and costs nothing before.
    """

    __slots__ = (
        "_host_query_indptr",
        "_lengths",
        "_page_table",
        "_snapshot",
        "_tables",
        "_version",
        "query_indptr",
        "slot_mapping",
    )

    def __init__(
        self,
        slot_mapping: torch.Tensor,
        query_indptr: torch.Tensor,
        tables: StepTables,
        snapshot: RowSnapshot,
        lengths: npt.NDArray[np.int64],
        host_query_indptr: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """For the planner: nobody writes to `lengths` [S] any more.

        host_query_indptr: what `query_indptr` holds, where that is on another device, so that plans do not ask it.
        """
        self.slot_mapping = slot_mapping
        self.query_indptr = query_indptr
        self._tables = tables
        self._version = tables.table_version
        self._snapshot = snapshot
        self._lengths = lengths
        self._host_query_indptr = host_query_indptr
        self._page_table: PageTable | None = None

    @property
    def seq_lens(self) -> torch.Tensor:
        """Tokens of each sequence, the new ones included: [S] int32, a copy."""
        return uploaded(self._lengths.astype(np.int32), self.query_indptr.device)

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return self.slot_mapping.shape[0]

    @property
    def page_table(self) -> PageTable:
        """CSR, the same at any time, whatever later steps and other calls do to the sequences.

        The positions of pages that a window has given back name page 0; attention with that window reads none of them.
        """
        if self._page_table is None:
            table = self._tables.csr_table(self._snapshot, self._lengths)
            if self._host_query_indptr is not None:
                table.know_query_indptr(self.query_indptr, self._host_query_indptr)
            self._page_table = table
        return self._page_table

    def dense_table(self) -> torch.Tensor:
        """The dense form [S, M] int32, -1 for unused, as a view of one buffer that later steps write their changes to.

        When: before the next step, which keeps it up to date from the first call on. -1 also where a window has given
              a page back.
        Raises: ValueError after a step that changed the table.
        """
        if self._tables.table_version != self._version:
            raise ValueError("the dense table must be asked for before the next step, got a step that is over.")
        return self._tables.dense_table()

    def __repr__(self) -> str:
        return f"StepBatch(num_seqs={self._lengths.shape[0]}, num_tokens={self.num_tokens})"


class BookedTable(PageTable):
    """A page table of arrays that the books vouch for and nobody writes to any more: neither copied nor checked.

    Its largest page is not looked for: `max_page` bounds it, and attention refuses a pool without that page.
    """

    __slots__ = ()

    def __init__(
        self,
        indptr: PageArray,
        indices: PageArray,
        seq_lens: PageArray,
        page_size: int,
        max_page: int,
        device: torch.device,
    ) -> None:
        self._host = host = HostTable(indptr, indices, seq_lens)
        self.indptr, self.indices, self._seq_lens = uploaded_together(host, device)
        self._last_page_len = self._longest = self._query = None
        self.page_size = page_size
        self._max_page = max_page
