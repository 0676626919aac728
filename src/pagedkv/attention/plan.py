"""From lengths and a page table to a checked plan that any number of layers run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..kernels import triton
from ..kernels.attention_plan import AttentionPlan, DeviceWork, PlanSettings
from ..kernels.cpu.attention_work import divide_attention
from ..kernels.upload import uploaded
from ..shapes import check_device, check_dtype, check_int
from ..storage.page_table import PageTable
from .plan_buffers import AttentionPlanBuffers

__all__ = ["plan_attention"]

_MOST_HEADS = 2**16


def plan_attention(
    query_indptr: torch.Tensor,
    table: PageTable,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    causal: bool = True,
    window_left: int = -1,
    custom_mask: torch.Tensor | None = None,
    packed_mask: torch.Tensor | None = None,
    buffers: AttentionPlanBuffers | None = None,
) -> AttentionPlan:
    """Checks a batch once and lays out its work, for use by `paged_attention` over all layers of a step.

    Shapes: query_indptr [S + 1] int32, new tokens of each sequence, packed: T = query_indptr[-1];
            custom_mask [sum q_len * kv_len] bool, each sequence's [q_len, kv_len] row-major, True = keep, on top of
            causal and window; or packed_mask [sum ceil(q_len * kv_len / 8)] uint8, the same as bits, the lowest bit
            first, each sequence from a byte of its own on.
    Rule:   causal is aligned bottom-right: row i stands at position kv_len - q_len + i. window_left w >= 0 keeps the
            w keys before a row's position and its own; -1 is no window.
    When:   the table already includes the new tokens.
    Device: that of the table. Of a table on a GPU, query_indptr may be on the CPU, which saves reading it back: nothing
            else is waited for where the table was built on the host.
    buffers: memory that the plan is written to in place of memory of its own, for CUDA graphs; no masks then.
    Raises: ValueError, TypeError for what breaks the lines above, before anything runs.
    """
    value_dim = head_dim if value_dim is None else value_dim
    for name, value in (
        ("num_q_heads", num_q_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
        ("value_dim", value_dim),
    ):
        check_int(name, value, minimum=1)
    check_int("window_left", window_left, minimum=-1)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}.")
    if num_q_heads > _MOST_HEADS:
        raise ValueError(f"num_q_heads must be at most {_MOST_HEADS}, got {num_q_heads}.")
    if num_q_heads % num_kv_heads:
        raise ValueError(f"num_q_heads must be a multiple of num_kv_heads = {num_kv_heads}, got {num_q_heads}.")
    if not isinstance(table, PageTable):
        raise TypeError(f"table must be a PageTable, got {type(table).__name__}. Build it with PageTable.from_rows.")
    starts = table.host_query_indptr(query_indptr, may_be_on_cpu=True)
    # Positions are below 2**31, so a wider window sees no more.
    window_left = min(window_left, 2**31 - 1)
    device, work, mask_indptr = table.device, None, None
    if buffers is not None or device.type != "cpu":
        settings = PlanSettings(num_q_heads, num_kv_heads, head_dim, value_dim, table.page_size, causal, window_left)
        if buffers is not None:
            if custom_mask is not None or packed_mask is not None:
                raise ValueError("custom_mask and packed_mask must be None with buffers, which have no room for them.")
            return _plan_in(buffers, settings, starts, table)
        work = _device_work(settings, starts, table)
    if custom_mask is not None or packed_mask is not None:
        custom_mask, mask_indptr = _checked_mask(custom_mask, packed_mask, starts, table)
    if query_indptr.device != device:
        query_indptr = uploaded(starts, device)
    else:
        # A copy: engines reuse the buffer for the next step.
        query_indptr = query_indptr.clone(memory_format=torch.contiguous_format)
    seq_lens = table.kept_seq_lens
    return AttentionPlan(
        query_indptr=query_indptr,
        page_indptr=table.indptr,
        page_indices=table.indices,
        seq_lens=seq_lens,
        page_size=table.page_size,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        causal=causal,
        window_left=window_left,
        num_tokens=int(starts[-1]),
        max_page=table.max_page,
        num_positions=_num_positions(starts, table),
        custom_mask=custom_mask,
        mask_indptr=mask_indptr,
        work=divide_attention(
            query_indptr,
            table.indptr,
            table.indices,
            seq_lens,
            table.page_size,
            num_q_heads,
            num_kv_heads,
            causal,
            window_left,
        ),
        device_work=work,
    )


def _plan_in(
    buffers: AttentionPlanBuffers, settings: PlanSettings, starts: npt.NDArray[np.int32], table: PageTable
) -> AttentionPlan:
    """A plan that is the content of the buffers, now this batch."""
    if not isinstance(buffers, AttentionPlanBuffers):
        raise TypeError(f"buffers must be AttentionPlanBuffers, got {type(buffers).__name__}.")
    buffers.check(settings, table.device, starts, table.host)
    buffers.write(settings, starts, table.host)
    return AttentionPlan(
        query_indptr=buffers.query_indptr,
        page_indptr=buffers.page_indptr,
        page_indices=buffers.page_indices,
        seq_lens=buffers.seq_lens,
        **settings._asdict(),
        num_tokens=int(starts[-1]),
        max_page=table.max_page,
        num_positions=buffers.num_positions,
        device_work=buffers.device_work,
    )


def _device_work(settings: PlanSettings, starts: npt.NDArray[np.int32], table: PageTable) -> DeviceWork | None:
    """The cut for the programs of a GPU, which is not waited for; None where no back end takes it."""
    module = triton.module_for(table.device, "attention_work")
    if module is None:
        return None
    host = module.divide_batch(settings, np.diff(starts), table.host.seq_lens, table.device)
    work: DeviceWork = module.uploaded_work(host, table.device)
    return work


def _num_positions(starts: npt.NDArray[np.int32], table: PageTable) -> int:
    longest = table.max_seq_len
    if int(starts[-1]) < longest or not table.num_seqs:
        return longest  # no sequence has more rows than keys
    first_positions = table.host.seq_lens - np.diff(starts)
    return max(longest, 1 - int(first_positions.min()))


def _checked_mask(
    custom_mask: torch.Tensor | None,
    packed_mask: torch.Tensor | None,
    starts: npt.NDArray[np.int32],
    table: PageTable,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask as bool, and where each sequence's part starts."""
    if custom_mask is not None and packed_mask is not None:
        raise ValueError("packed_mask must not be given with custom_mask, got both. Pass one of them.")
    name, mask, dtype = (
        ("packed_mask", packed_mask, torch.uint8) if custom_mask is None else ("custom_mask", custom_mask, torch.bool)
    )
    assert mask is not None  # the caller has one of them
    check_dtype(name, mask, dtype)
    check_device(name, mask, table.device, "query_indptr")
    sizes = np.diff(starts).astype(np.int64) * table.host.seq_lens
    held = sizes if custom_mask is not None else (sizes + 7) // 8
    rule = "q_len * kv_len" if custom_mask is not None else "ceil(q_len * kv_len / 8)"
    if mask.dim() != 1 or mask.shape[0] != int(held.sum()):
        raise ValueError(
            f"{name} must have shape [sum {rule}] with a sum of {int(held.sum())}, got {list(mask.shape)}."
        )
    if custom_mask is None:
        mask = _unpacked(mask, held.tolist(), sizes.tolist())
    else:
        # A copy, as of the other arrays: callers reuse theirs.
        mask = mask.clone(memory_format=torch.contiguous_format)
    return mask, uploaded(np.concatenate([[0], sizes.cumsum()]), table.device)


def _unpacked(packed_mask: torch.Tensor, num_bytes: list[int], num_bits: list[int]) -> torch.Tensor:
    """The bits of each sequence, without those that fill its last byte."""
    bits = ((packed_mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed_mask.device)) & 1).bool()
    parts = [part.flatten()[:size] for part, size in zip(torch.split(bits, num_bytes), num_bits, strict=True)]
    return torch.cat(parts) if parts else bits.flatten()
