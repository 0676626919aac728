"""A batch for attention: random tokens on shuffled pages, and poison wherever no sequence has a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from ..attention.plan import plan_attention
from ..kernels.attention_plan import AttentionPlan
from ..kernels.merge_states import AttentionState
from ..kernels.paged_attention import paged_attention
from ..shapes import QUANTISED_DTYPES
from ..storage.page_table import PageTable
from .page_views import kv_page_views
from .poison import owned_slots, poison_unused

__all__ = ["AttentionBatch", "attention_batch"]

# Of float8 the bits of a NaN, of int8 the largest element: what unused slots of quantised pages hold.
_POISON = 0x7F

# Stands for scales of each token and head.
_EACH_TOKEN = object()


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Arguments of one `paged_attention` call."""

    query: torch.Tensor
    key_pages: torch.Tensor
    value_pages: torch.Tensor
    table: PageTable
    plan: AttentionPlan
    layout: str
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **options: Any) -> AttentionState:
        """Output and log-sum-exp of this batch; `options` come before those of the batch."""
        state = paged_attention(
            self.query,
            self.key_pages,
            self.value_pages,
            self.plan,
            layout=self.layout,
            return_lse=True,
            **{**self.options, **options},
        )
        assert isinstance(state, AttentionState)
        return state


def attention_batch(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    value_dim: int | None = None,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    layout: str = "NHD",
    form: str = "separate",
    causal: bool = True,
    window_left: int = -1,
    custom_mask: torch.Tensor | None = None,
    **options: Any,
) -> AttentionBatch:
    """Builds a batch from the new and the total tokens of each sequence.

    dtype:   of the pages; quantised pages hold random tokens by scales of each token and head, which join the options,
             or by the float (None: 1) that is given as key_scales, value_scales. query_dtype defaults to dtype, or to
             float32 for quantised pages.
    form:    as in `kv_page_views`.
    options: the keywords of `paged_attention` for `AttentionBatch.run`.
    """
    value_dim = head_dim if value_dim is None else value_dim
    counts = [-(-kv_len // page_size) for kv_len in kv_lens]
    num_pages = sum(counts) + 2
    ids = iter(torch.randperm(num_pages).tolist())
    table = PageTable.from_rows([[next(ids) for _ in range(count)] for count in counts], kv_lens, page_size)
    is_quantised = dtype in QUANTISED_DTYPES
    key_pages, value_pages = kv_page_views(
        form,
        layout,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=torch.int8 if is_quantised else dtype,
    )
    for name, pages in (("key_scales", key_pages), ("value_scales", value_pages)):
        if is_quantised:
            in_slot_order = pages.transpose(1, 2) if layout == "HND" else pages
            options[name] = _fill_quantised(in_slot_order, dtype, table, options.get(name, _EACH_TOKEN))
        else:
            pages.copy_(torch.randn(pages.shape))
            poison_unused(pages, table, layout=layout)
    num_q_heads = num_kv_heads * group
    plan = plan_attention(
        torch.tensor([0, *accumulate(q_lens)], dtype=torch.int32),
        table,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        causal=causal,
        window_left=window_left,
        custom_mask=custom_mask,
    )
    query = torch.randn(sum(q_lens), num_q_heads, head_dim).to(
        query_dtype or (torch.float32 if is_quantised else dtype)
    )
    return AttentionBatch(query, key_pages.view(dtype), value_pages.view(dtype), table, plan, layout, options)


def _fill_quantised(pages: torch.Tensor, dtype: torch.dtype, table: PageTable, scales: Any) -> Any:
    """Fills int8 views [N, P, Hk, D] of pages of `dtype`; returns the scales, which for _EACH_TOKEN are made."""
    tokens = torch.randn(pages.shape)
    unused = ~owned_slots(table, pages.shape[0])
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    if scales is _EACH_TOKEN:
        of_token = tokens.abs().amax(-1, keepdim=True) / largest
        scales = of_token.squeeze(-1).masked_fill(unused[:, :, None], torch.nan).transpose(1, 2)
        tokens /= of_token
    elif scales is not None:
        tokens /= scales
    tokens = tokens.clamp(-largest, largest)
    pages.copy_(tokens.round() if dtype == torch.int8 else tokens.to(dtype).view(torch.int8))
    pages[unused] = _POISON
    return scales
