"""What one attention call reads and computes, as plain tensors: made once, run over many layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["AttentionPlan", "DeviceWork", "PlanSettings"]


class PlanSettings(NamedTuple):
    """What of a plan is no matter of the batch."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int
    causal: bool
    window_left: int

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_q_heads // self.num_kv_heads


class DeviceWork(NamedTuple):
    """The work of a batch for programs of a GPU; kernels/triton/attention_work.py says how it is cut.

    Shapes: few, some, many [n, 5] int32, items for low, middle and high tiles: sequence, its first row, first key and
            end of the keys, first partial row or -1 for a result that is final. An item of a sequence below 0 is none.
            merges [m, 5] int32, rows that several items compute: token, head within its group, its partial row of the
            first chunk, rows from there to that of the next, chunks. A row of no chunks is none.
    """

    few: torch.Tensor
    some: torch.Tensor
    many: torch.Tensor
    merges: torch.Tensor
    num_partial_rows: int

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], num_partial_rows: int) -> DeviceWork:
        """From items of the three heights, and merges."""
        few, some, many, merges = tensors
        return cls(few, some, many, merges, num_partial_rows)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A checked batch: which query rows, which pages, which mask. Built by `pagedkv.plan_attention`; not changed after.

    Shapes: query_indptr [S + 1] int32; page_indptr [S + 1] int32; page_indices [>= page_indptr[-1]] int32;
            seq_lens [S] int32, keys of each sequence, the new ones included;
            custom_mask [sum q_len * kv_len] bool, row-major a sequence, True = keep; mask_indptr [S + 1] int64.
    window_left: -1 for none, else a row at position p sees keys from p - window_left on.
    max_page: largest page id named, -1 for none.
    num_positions: above every position of a key, and above minus that of every row.
    work: how the batch is cut into items for threads, as the native core wrote it ([n] int64); None leaves the cut to
            the back end at each call. device_work: the same for a GPU.
    """

    query_indptr: torch.Tensor
    page_indptr: torch.Tensor
    page_indices: torch.Tensor
    seq_lens: torch.Tensor
    page_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    window_left: int
    num_tokens: int
    max_page: int
    num_positions: int
    custom_mask: torch.Tensor | None = None
    mask_indptr: torch.Tensor | None = None
    work: torch.Tensor | None = None
    device_work: DeviceWork | None = None

    @property
    def settings(self) -> PlanSettings:
        """The plan without its batch."""
        return PlanSettings(*(getattr(self, name) for name in PlanSettings._fields))

    @property
    def num_seqs(self) -> int:
        """S, the sequences of the batch."""
        return int(self.seq_lens.shape[0])

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def workspace_bytes(self) -> int:
        """Bytes the native core takes at most for results of sequences that several items compute, 0 without `work`."""
        if self.work is None:
            return 0
        # Rows are padded to whole vectors, of at most 16 floats.
        return int(self.work[0]) * 4 * (-(-self.value_dim // 16) * 16 + 2)

    def pack(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
        """The plan as the arguments of a torch op; `unpack` is the inverse."""
        masks = [] if self.custom_mask is None or self.mask_indptr is None else [self.custom_mask, self.mask_indptr]
        tensors = [self.query_indptr, self.page_indptr, self.page_indices, self.seq_lens]
        tensors += [] if self.work is None else [self.work]
        tensors += [] if self.device_work is None else self.device_work[:4]
        numbers = [
            self.page_size,
            self.num_q_heads,
            self.num_kv_heads,
            self.head_dim,
            self.value_dim,
            int(self.causal),
            self.window_left,
            self.num_tokens,
            self.max_page,
            self.num_positions,
            0 if self.device_work is None else self.device_work.num_partial_rows,
        ]
        return tensors, masks, numbers

    @classmethod
    def unpack(
        cls, tensors: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], numbers: Sequence[int]
    ) -> AttentionPlan:
        """Rebuilds a plan from what `pack` gave."""
        page_size, num_q_heads, num_kv_heads, head_dim, value_dim, causal, window_left, num_tokens = numbers[:8]
        max_page, num_positions, num_partial_rows = numbers[8:]
        query_indptr, page_indptr, page_indices, seq_lens, *work = tensors
        device_work = None
        if len(work) >= 4:
            device_work = DeviceWork.of(work[-4:], num_partial_rows)
        custom_mask, mask_indptr = masks if masks else (None, None)
        return cls(
            query_indptr=query_indptr,
            page_indptr=page_indptr,
            page_indices=page_indices,
            seq_lens=seq_lens,
            page_size=page_size,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            causal=bool(causal),
            window_left=window_left,
            num_tokens=num_tokens,
            max_page=max_page,
            num_positions=num_positions,
            custom_mask=custom_mask,
            mask_indptr=mask_indptr,
            work=work[0] if len(work) % 4 else None,
            device_work=device_work,
        )
