"""One new token for each of many sequences, of any lengths, on pages that they may share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import pagedkv

from .case import Ceiling
from .paged_kv import KV, PAGE_SIZE, gathered
from .truth import check_error, exact_attention

__all__ = ["Heads", "RaggedDecode"]


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and their width."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"Hq{self.num_q_heads}-Hk{self.num_kv_heads}-D{self.head_dim}"

    def decode_flops(self, num_keys: int) -> Ceiling:
        """Q.K and P.V of every query head over the keys of all sequences."""
        return Ceiling("matmul", 4 * num_keys * self.num_q_heads * self.head_dim)


class RaggedDecode:
    """Sequence s has kv_lens[s] tokens on the pages rows[s]; query [S, Hq, D]; round i reads pools[i % len(pools)]."""

    def __init__(
        self,
        heads: Heads,
        rows: Sequence[Sequence[int]],
        kv_lens: Sequence[int],
        query: torch.Tensor,
        pools: Sequence[KV],
        layout: str,
    ) -> None:
        self.rows, self.kv_lens, self.query, self.pools, self.layout = rows, kv_lens, query, pools, layout
        self.heads = heads
        self.query_indptr = torch.arange(len(rows) + 1, dtype=torch.int32)
        self.table = pagedkv.PageTable.from_rows(rows, kv_lens, page_size=PAGE_SIZE)
        self.plan = self.planned()

    def planned(self) -> pagedkv.AttentionPlan:
        """A plan of these sequences, made now."""
        heads = self.heads
        return pagedkv.plan_attention(
            self.query_indptr,
            self.table,
            num_q_heads=heads.num_q_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
        )

    def run(self, i: int) -> torch.Tensor:
        """Ours."""
        pages = self.pools[i % len(self.pools)]
        out = pagedkv.paged_attention(self.query, pages.key, pages.value, self.plan, layout=self.layout)
        assert isinstance(out, torch.Tensor)
        return out

    def check(self, sample: Iterable[int]) -> None:
        """The rule of `check_error` for some of the sequences, each by itself."""
        ours = self.run(0)
        for sequence in sample:
            row = torch.tensor(self.rows[sequence])[None]
            kv = gathered(self.pools[0], row, self.kv_lens[sequence], self.layout).at(0)
            query = self.query[sequence][:, None]
            peer = F.scaled_dot_product_attention(query[None], kv.key[None], kv.value[None], enable_gqa=True)[0]
            check_error(ours[sequence], peer[:, 0], exact_attention(query, kv)[:, 0])
