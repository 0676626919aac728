"""From lengths and a page table to a checked plan that any number of layers run."""

from __future__ import annotations

import torch

from ..kernels.attention_plan import AttentionPlan
from ..shapes import check_device, check_dtype, check_int
from ..storage.page_table import PageTable

__all__ = ["plan_attention"]


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
) -> AttentionPlan:
    """Checks a batch once and lays out its work, for use by `paged_attention` over all layers of a step.

    Shapes: query_indptr [S + 1] int32, new tokens of each sequence, packed: T = query_indptr[-1];
            custom_mask [sum q_len * kv_len] bool, each sequence's [q_len, kv_len] row-major, True = keep, on top of
            causal and window.
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
    if num_q_heads % num_kv_heads:
        raise ValueError(f"num_q_heads must be a multiple of num_kv_heads = {num_kv_heads}, got {num_q_heads}.")
    if not isinstance(table, PageTable):
        raise TypeError(f"table must be a PageTable, got {type(table).__name__}. Build it with PageTable.from_rows.")
    num_tokens = table.check_query_indptr(query_indptr)
    mask_indptr = None
    if custom_mask is not None:
        mask_indptr = _check_mask(custom_mask, query_indptr, table)
        custom_mask = custom_mask.contiguous()
    # A copy: engines reuse the buffer for the next step.
    query_indptr = query_indptr.clone(memory_format=torch.contiguous_format)
    return AttentionPlan(
        query_indptr=query_indptr,
        page_indptr=table.indptr,
        page_indices=table.indices,
        seq_lens=table.seq_lens,
        page_size=table.page_size,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        causal=bool(causal),
        # Positions are below 2**31, so a wider window sees no more.
        window_left=min(window_left, 2**31 - 1),
        num_tokens=num_tokens,
        max_page=table.max_page,
        custom_mask=custom_mask,
        mask_indptr=mask_indptr,
    )


def _check_mask(custom_mask: torch.Tensor, query_indptr: torch.Tensor, table: PageTable) -> torch.Tensor:
    check_dtype("custom_mask", custom_mask, torch.bool)
    check_device("custom_mask", custom_mask, query_indptr.device, "query_indptr")
    sizes = (query_indptr[1:] - query_indptr[:-1]).to(torch.int64) * table.seq_lens
    mask_indptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    if custom_mask.dim() != 1 or custom_mask.shape[0] != int(mask_indptr[-1]):
        raise ValueError(
            f"custom_mask must have shape [sum q_len * kv_len] with a sum of {int(mask_indptr[-1])}, "
            f"got {list(custom_mask.shape)}."
        )
    return mask_indptr
