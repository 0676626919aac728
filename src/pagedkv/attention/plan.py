"""From lengths and a page table to a checked plan that any number of layers run."""

from __future__ import annotations

import torch

from ..kernels.attention_plan import AttentionPlan
from ..kernels.cpu.attention_work import divide_attention
from ..shapes import check_device, check_dtype, check_int
from ..storage.page_table import PageTable

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
) -> AttentionPlan:
    """Checks a batch once and lays out its work, for use by `paged_attention` over all layers of a step.

    Shapes: query_indptr [S + 1] int32, new tokens of each sequence, packed: T = query_indptr[-1];
            custom_mask [sum q_len * kv_len] bool, each sequence's [q_len, kv_len] row-major, True = keep, on top of
            causal and window; or packed_mask [sum ceil(q_len * kv_len / 8)] uint8, the same as bits, the lowest bit
            first, each sequence from a byte of its own on.
    Rule:   causal is aligned bottom-right: row i stands at position kv_len - q_len + i. window_left w >= 0 keeps the
            w keys before a row's position and its own; -1 is no window.
    When:   the table already includes the new tokens.
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
    num_tokens = table.check_query_indptr(query_indptr)
    seq_lens = table.seq_lens
    mask_indptr = None
    if custom_mask is not None or packed_mask is not None:
        custom_mask, mask_indptr = _checked_mask(custom_mask, packed_mask, query_indptr, seq_lens)
    # A copy: engines reuse the buffer for the next step.
    query_indptr = query_indptr.clone(memory_format=torch.contiguous_format)
    # Positions are below 2**31, so a wider window sees no more.
    window_left = min(window_left, 2**31 - 1)
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
        num_tokens=num_tokens,
        max_page=table.max_page,
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
    )


def _checked_mask(
    custom_mask: torch.Tensor | None,
    packed_mask: torch.Tensor | None,
    query_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask as bool, and where each sequence's part starts."""
    if custom_mask is not None and packed_mask is not None:
        raise ValueError("packed_mask must not be given with custom_mask, got both. Pass one of them.")
    name, mask, dtype = (
        ("packed_mask", packed_mask, torch.uint8) if custom_mask is None else ("custom_mask", custom_mask, torch.bool)
    )
    assert mask is not None  # the caller has one of them
    check_dtype(name, mask, dtype)
    check_device(name, mask, query_indptr.device, "query_indptr")
    sizes = (query_indptr[1:] - query_indptr[:-1]).to(torch.int64) * seq_lens
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
    return mask, torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def _unpacked(packed_mask: torch.Tensor, num_bytes: list[int], num_bits: list[int]) -> torch.Tensor:
    """The bits of each sequence, without those that fill its last byte."""
    bits = ((packed_mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed_mask.device)) & 1).bool()
    parts = [part.flatten()[:size] for part, size in zip(torch.split(bits, num_bytes), num_bits, strict=True)]
    return torch.cat(parts) if parts else bits.flatten()
