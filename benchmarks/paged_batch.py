"""A batch of sequences on shuffled pages, the same keys and values contiguously for the peers, and the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import pagedkv

from .case import OURS, WrongResultError, rotations

__all__ = ["BatchShape", "PagedBatch", "check_attention"]

_PAGE_SIZE = 16


@dataclass(frozen=True)
class BatchShape:
    """S sequences, each with q_len new tokens on kv_len."""

    num_seqs: int
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of the batch."""
        return 2 * self.num_seqs * self.kv_len * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def num_flops(self) -> int:
        """Multiplications and additions of Q.K and P.V over the keys that causal rows see."""
        visible = sum(self.kv_len - self.q_len + row + 1 for row in range(self.q_len))
        return 4 * self.num_seqs * self.num_q_heads * self.head_dim * visible


class PagedBatch:
    """The memory of one case: query [T, Hq, D], and K and V of rotation r in pages[r] and (by head) contiguous[r]."""

    def __init__(self, shape: BatchShape, layout: str) -> None:
        self.shape, self.layout = shape, layout
        pages_each = -(-shape.kv_len // _PAGE_SIZE)
        num_pages = shape.num_seqs * pages_each
        self.rows = torch.randperm(num_pages).view(shape.num_seqs, pages_each)
        table = pagedkv.PageTable.from_rows(self.rows.tolist(), [shape.kv_len] * shape.num_seqs, page_size=_PAGE_SIZE)
        query_indptr = torch.arange(0, shape.num_seqs * shape.q_len + 1, shape.q_len, dtype=torch.int32)
        self.plan = pagedkv.plan_attention(
            query_indptr,
            table,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )
        self.query = torch.randn(shape.num_seqs * shape.q_len, shape.num_q_heads, shape.head_dim).to(shape.dtype)
        inner = (_PAGE_SIZE, shape.num_kv_heads) if layout == "NHD" else (shape.num_kv_heads, _PAGE_SIZE)
        first = torch.randn(2, num_pages, *inner, shape.head_dim).to(shape.dtype)
        count = rotations(shape.kv_bytes)
        self.pages = [(first[0], first[1])] + [tuple(first.clone()) for _ in range(count - 1)]
        whole = [self._contiguous(pages) for pages in first]
        self.contiguous = [tuple(whole)] + [tuple(kv.clone() for kv in whole) for _ in range(count - 1)]

    def _contiguous(self, pages: torch.Tensor) -> torch.Tensor:
        return self.gathered(pages).contiguous()

    def gathered(self, pages: torch.Tensor) -> torch.Tensor:
        """[S, Hk, kv_len, D] by one index_select over the pages."""
        shape = self.shape
        taken = pages.index_select(0, self.rows.flatten()).view(*self.rows.shape, *pages.shape[1:])
        in_head_order = taken.permute(0, 3, 1, 2, 4) if self.layout == "NHD" else taken.permute(0, 2, 1, 3, 4)
        return in_head_order.flatten(2, 3)[:, :, : shape.kv_len]

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
        key_pages, value_pages = self.pages[i % len(self.pages)]
        out = pagedkv.paged_attention(self.query, key_pages, value_pages, self.plan, layout=self.layout)
        assert isinstance(out, torch.Tensor)
        return out


def check_attention(batch: PagedBatch, peer: torch.Tensor) -> None:
    """Ours may err at most twice as far from float64 as `peer`, torch in the same dtype, plus one rounding."""
    truth = _float64(batch)
    ours = batch.run(0)
    rounding = torch.finfo(batch.shape.dtype).eps * float(truth.abs().max())
    allowed = 2 * float((peer.double() - truth).abs().max()) + rounding
    error = float((ours.double() - truth).abs().max())
    if not error <= allowed:
        raise WrongResultError(f"{OURS} is off by {error:.3g}, allowed are {allowed:.3g}")


def _float64(batch: PagedBatch) -> torch.Tensor:
    """Sequence by sequence and head by head, so that a long prompt fits in memory."""
    shape, (key, value) = batch.shape, batch.contiguous[0]
    query, mask = batch.query_by_head(), batch.mask()
    out = torch.empty(query.shape, dtype=torch.float64)
    group = shape.num_q_heads // shape.num_kv_heads
    for sequence in range(shape.num_seqs):
        for head in range(shape.num_q_heads):
            row = F.scaled_dot_product_attention(
                query[sequence, head].double()[None],
                key[sequence, head // group].double()[None],
                value[sequence, head // group].double()[None],
                attn_mask=mask,
                is_causal=mask is None and shape.q_len > 1,
            )
            out[sequence, head] = row[0]
    return batch.packed(out)
