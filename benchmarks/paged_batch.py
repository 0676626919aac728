"""A batch of equal sequences on shuffled pages, the same keys and values contiguously for the peers, and the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import pagedkv
from pagedkv.spec import SCALED_DTYPES

from .case import Ceiling, rotations
from .paged_kv import KV, PAGE_SIZE, gathered, random_pages, token_bytes
from .truth import check_error, exact_attention

__all__ = ["BatchShape", "PagedBatch", "check_attention"]


@dataclass(frozen=True)
class BatchShape:
    """S sequences, each with q_len new tokens on kv_len; `dtype` is that of the pages."""

    num_seqs: int
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def query_dtype(self) -> torch.dtype:
        """That of the pages, float32 for quantised ones."""
        return torch.float32 if self.dtype in SCALED_DTYPES else self.dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of the batch, and of their scales."""
        return self.num_seqs * self.kv_len * token_bytes(self.num_kv_heads, self.head_dim, self.dtype)

    @property
    def num_flops(self) -> int:
        """Multiplications and additions of Q.K and P.V over the keys that causal rows see."""
        visible = sum(self.kv_len - self.q_len + row + 1 for row in range(self.q_len))
        return 4 * self.num_seqs * self.num_q_heads * self.head_dim * visible

    @property
    def ceilings(self) -> list[Ceiling]:
        """Every key and value is read, and every product computed, at least once."""
        return [Ceiling("read", self.kv_bytes), Ceiling("matmul", self.num_flops)]


class PagedBatch:
    """The memory of one case: query [T, Hq, D], and K and V of rotation r in pages[r] and (by head) contiguous[r]."""

    def __init__(self, shape: BatchShape, layout: str) -> None:
        self.shape, self.layout = shape, layout
        pages_each = -(-shape.kv_len // PAGE_SIZE)
        num_pages = shape.num_seqs * pages_each
        self.rows = torch.randperm(num_pages).view(shape.num_seqs, pages_each)
        table = pagedkv.PageTable.from_rows(self.rows.tolist(), [shape.kv_len] * shape.num_seqs, page_size=PAGE_SIZE)
        query_indptr = torch.arange(0, shape.num_seqs * shape.q_len + 1, shape.q_len, dtype=torch.int32)
        self.plan = pagedkv.plan_attention(
            query_indptr,
            table,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )
        query = torch.randn(shape.num_seqs * shape.q_len, shape.num_q_heads, shape.head_dim)
        self.query = query.to(shape.query_dtype)
        first = random_pages(num_pages, shape.num_kv_heads, shape.head_dim, shape.dtype, layout)
        whole = gathered(first, self.rows, shape.kv_len, layout).contiguous()
        count = rotations(shape.kv_bytes)
        self.pages = [first] + [first.clone() for _ in range(count - 1)]
        self.contiguous = [whole] + [whole.clone() for _ in range(count - 1)]

    def far_from(self, i: int) -> int:
        """A round half a rotation away, for a peer that must not find in the caches what others have just touched."""
        return i + len(self.pages) // 2

    def gathered(self, i: int) -> KV:
        """K and V of round i as `contiguous` has them, taken out of the pages now."""
        return gathered(self.pages[i % len(self.pages)], self.rows, self.shape.kv_len, self.layout)

    def query_by_head(self) -> torch.Tensor:
        """[S, Hq, q_len, D], as torch's attention takes it."""
        shape = self.shape
        return self.query.view(shape.num_seqs, shape.q_len, shape.num_q_heads, shape.head_dim).transpose(1, 2)

    def packed(self, out: torch.Tensor) -> torch.Tensor:
        """[S, Hq, q_len, D] back to [T, Hq, D]."""
        return out.transpose(1, 2).flatten(0, 1)

    def mask(self) -> torch.Tensor | None:
        """None where torch's own causal flag means the same; else keys that each row sees, aligned bottom-right."""
        shape = self.shape
        if shape.q_len == shape.kv_len or shape.q_len == 1:
            return None
        return torch.ones(shape.q_len, shape.kv_len, dtype=torch.bool).tril(shape.kv_len - shape.q_len)

    def run(self, i: int) -> torch.Tensor:
        """Ours."""
        kv = self.pages[i % len(self.pages)]
        out = pagedkv.paged_attention(
            self.query,
            kv.key,
            kv.value,
            self.plan,
            layout=self.layout,
            key_scales=kv.key_scales,
            value_scales=kv.value_scales,
        )
        assert isinstance(out, torch.Tensor)
        return out


def check_attention(batch: PagedBatch, peer: torch.Tensor) -> None:
    """The rule of `check_error`; peer [S, Hq, q_len, D]."""
    shape, mask, query = batch.shape, batch.mask(), batch.query_by_head()
    is_causal = mask is None and shape.q_len > 1
    truth = [
        exact_attention(query[sequence], batch.contiguous[0].at(sequence), mask=mask, is_causal=is_causal)
        for sequence in range(shape.num_seqs)
    ]
    check_error(batch.run(0), batch.packed(peer), batch.packed(torch.stack(truth)))
