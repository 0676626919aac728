"""A batch for latent attention: random tokens on shuffled pages, and NaN wherever no sequence has a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..attention.plan import plan_attention
from ..kernels.attention_plan import AttentionPlan
from ..kernels.merge_states import AttentionState
from ..kernels.mla_attention import mla_attention
from ..storage.page_table import PageTable
from .poison import poison_unused

__all__ = ["MLA_PAGE_FORMS", "MLABatch", "mla_batch", "mla_page_views"]

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class MLABatch:
    """Arguments of one `mla_attention` call."""

    q_latent: torch.Tensor
    q_rope: torch.Tensor | None
    latent_pages: torch.Tensor
    rope_pages: torch.Tensor | None
    table: PageTable
    plan: AttentionPlan
    sm_scale: float

    def arguments(self) -> dict[str, Any]:
        """All of the call but its options."""
        names = ("q_latent", "q_rope", "latent_pages", "rope_pages", "plan", "sm_scale")
        return {name: getattr(self, name) for name in names}

    def run(self, **options: Any) -> AttentionState:
        """Output and log-sum-exp of this batch."""
        state = mla_attention(**self.arguments(), return_lse=True, **options)
        assert isinstance(state, AttentionState)
        return state


def mla_batch(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    num_heads: int = 3,
    latent_dim: int = 64,
    rope_dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    form: str = "separate",
    sm_scale: float | None = None,
    **plan_options: Any,
) -> MLABatch:
    """Builds a batch from the new and the total tokens of each sequence; `form` as in `mla_page_views`.

    rope_dim 0 gives None for q_rope and rope_pages; sm_scale defaults to 1 / sqrt(C + R).
    plan_options: causal, window_left, custom_mask.
    """
    counts = [-(-kv_len // page_size) for kv_len in kv_lens]
    num_pages = sum(counts) + 2
    ids = iter(torch.randperm(num_pages).tolist())
    table = PageTable.from_rows([[next(ids) for _ in range(count)] for count in counts], kv_lens, page_size)
    pair = mla_page_views(
        form, num_pages=num_pages, page_size=page_size, latent_dim=latent_dim, rope_dim=rope_dim, dtype=dtype
    )
    for pages in pair:
        pages.copy_(torch.randn(pages.shape))
        poison_unused(pages, table)
    plan = plan_attention(
        torch.tensor([0, *accumulate(q_lens)], dtype=torch.int32),
        table,
        num_q_heads=num_heads,
        num_kv_heads=1,
        head_dim=latent_dim + rope_dim,
        value_dim=latent_dim,
        **plan_options,
    )
    q_latent, q_rope = (
        torch.randn(sum(q_lens), num_heads, dim).to(query_dtype or dtype) for dim in (latent_dim, rope_dim)
    )
    rope = (q_rope, pair[1]) if rope_dim else (None, None)
    sm_scale = (latent_dim + rope_dim) ** -0.5 if sm_scale is None else sm_scale
    return MLABatch(q_latent, rope[0], pair[0], rope[1], table, plan, sm_scale)


def mla_page_views(
    form: str,
    *,
    num_pages: int,
    page_size: int,
    latent_dim: int,
    rope_dim: int,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """Uninitialised latent_pages [N, P, C] and rope_pages [N, P, R] in the form `form`.

    "separate" two tensors · "joined" views of one [N, P, C + R] · "page_first" the middle layer of three in
    [N, 3, P, C + R] · "sliced" odd offsets and gaps on every axis but the last.
    """
    return MLA_PAGE_FORMS[form](num_pages, page_size, latent_dim, rope_dim, dtype)


def _separate(num_pages: int, page_size: int, latent_dim: int, rope_dim: int, dtype: torch.dtype) -> Pair:
    return (
        torch.empty(num_pages, page_size, latent_dim, dtype=dtype),
        torch.empty(num_pages, page_size, rope_dim, dtype=dtype),
    )


def _joined(num_pages: int, page_size: int, latent_dim: int, rope_dim: int, dtype: torch.dtype) -> Pair:
    both = torch.empty(num_pages, page_size, latent_dim + rope_dim, dtype=dtype)
    return both[..., :latent_dim], both[..., latent_dim:]


def _page_first(num_pages: int, page_size: int, latent_dim: int, rope_dim: int, dtype: torch.dtype) -> Pair:
    layers = torch.empty(num_pages, 3, page_size, latent_dim + rope_dim, dtype=dtype)
    return layers[:, 1, :, :latent_dim], layers[:, 1, :, latent_dim:]


def _sliced(num_pages: int, page_size: int, latent_dim: int, rope_dim: int, dtype: torch.dtype) -> Pair:
    wide = torch.empty(num_pages + 1, page_size + 2, latent_dim + rope_dim + 3, dtype=dtype)
    pages = wide[1:, 1:-1]
    return pages[..., 1 : 1 + latent_dim], pages[..., 2 + latent_dim : 2 + latent_dim + rope_dim]


MLA_PAGE_FORMS: dict[str, Callable[[int, int, int, int, torch.dtype], Pair]] = {
    "separate": _separate,
    "joined": _joined,
    "page_first": _page_first,
    "sliced": _sliced,
}
