"""mla_attention of one new token a sequence: many heads on one latent a token, so mostly arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

import pagedkv

from ..case import OURS, Case, CaseSpec, Ceiling, Options, dtype_label, rotations
from ..paged_kv import KV, PAGE_SIZE
from ..truth import check_error, exact_attention

__all__ = ["cases"]

# S, context, heads: a tensor-parallel rank of DeepSeek-V3, and all of it.
_SHAPES = ((32, 1024, 16), (8, 1024, 128))
_QUICK_SHAPES = ((8, 512, 16),)
_DTYPES = (torch.float32, torch.bfloat16)
_LATENT_DIM, _ROPE_DIM = 512, 64
_SM_SCALE = (128 + 64) ** -0.5


def cases(options: Options) -> Iterator[CaseSpec]:
    """Each shape in each dtype; latent pages have no heads, hence no layout."""
    for num_seqs, context, heads in _QUICK_SHAPES if options.quick else _SHAPES:
        for dtype in _DTYPES:
            name = f"S{num_seqs}-ctx{context}-H{heads}-C{_LATENT_DIM}-R{_ROPE_DIM}-{dtype_label(dtype)}"
            yield CaseSpec("attention_mla", name, partial(_build, LatentShape(num_seqs, context, heads, dtype)))


@dataclass(frozen=True)
class LatentShape:
    """S sequences with one new token each on kv_len latents."""

    num_seqs: int
    kv_len: int
    num_heads: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Latents and rope keys of the batch."""
        return self.num_seqs * self.kv_len * (_LATENT_DIM + _ROPE_DIM) * self.dtype.itemsize

    @property
    def num_flops(self) -> int:
        """Every head's product with latent and rope key, and the sum of latents."""
        return 2 * self.num_seqs * self.kv_len * self.num_heads * (_LATENT_DIM + _ROPE_DIM + _LATENT_DIM)


class LatentBatch:
    """query [S, H, C + R]; latents and rope keys side by side, as MLAPool holds them, in pages and contiguously."""

    def __init__(self, shape: LatentShape) -> None:
        self.shape = shape
        pages_each = -(-shape.kv_len // PAGE_SIZE)
        num_pages = shape.num_seqs * pages_each
        self.rows = torch.randperm(num_pages).view(shape.num_seqs, pages_each)
        table = pagedkv.PageTable.from_rows(self.rows.tolist(), [shape.kv_len] * shape.num_seqs, page_size=PAGE_SIZE)
        self.plan = pagedkv.plan_attention(
            torch.arange(shape.num_seqs + 1, dtype=torch.int32),
            table,
            num_q_heads=shape.num_heads,
            num_kv_heads=1,
            head_dim=_LATENT_DIM + _ROPE_DIM,
            value_dim=_LATENT_DIM,
        )
        width = _LATENT_DIM + _ROPE_DIM
        self.query = torch.randn(shape.num_seqs, shape.num_heads, width).to(shape.dtype)
        self.q_latent, self.q_rope = (part.contiguous() for part in self.query.split([_LATENT_DIM, _ROPE_DIM], 2))
        first = torch.randn(num_pages, PAGE_SIZE, width).to(shape.dtype)
        count = rotations(shape.num_bytes)
        self.pages = [first] + [first.clone() for _ in range(count - 1)]
        self.contiguous = [self.gathered(i).contiguous() for i in range(count)]

    def gathered(self, i: int) -> torch.Tensor:
        """[S, kv_len, C + R] of round i, taken out of the pages now."""
        tokens = self.pages[i % len(self.pages)].index_select(0, self.rows.flatten())
        return tokens.view(self.shape.num_seqs, -1, _LATENT_DIM + _ROPE_DIM)[:, : self.shape.kv_len]

    def run(self, i: int) -> torch.Tensor:
        """Ours."""
        pages = self.pages[i % len(self.pages)]
        latent_pages, rope_pages = pages[..., :_LATENT_DIM], pages[..., _LATENT_DIM:]
        out = pagedkv.mla_attention(self.q_latent, self.q_rope, latent_pages, rope_pages, self.plan, sm_scale=_SM_SCALE)
        assert isinstance(out, torch.Tensor)
        return out

    def products(self, tokens: torch.Tensor) -> torch.Tensor:
        """The two products in torch, batched by sequence: tokens [S, kv_len, C + R]."""
        weights = torch.softmax(torch.bmm(self.query, tokens.transpose(1, 2)) * _SM_SCALE, 2)
        return torch.bmm(weights, tokens[..., :_LATENT_DIM])

    def check(self) -> None:
        """The rule of `check_error`."""
        exact = []
        for query, tokens in zip(self.query, self.contiguous[0], strict=True):
            kv = KV(tokens[None], tokens[None, :, :_LATENT_DIM])
            exact.append(exact_attention(query[:, None], kv, scale=_SM_SCALE)[:, 0])
        check_error(self.run(0), self.products(self.contiguous[0]), torch.stack(exact))


def _build(shape: LatentShape) -> Case:
    batch = LatentBatch(shape)
    return Case(
        contenders={
            OURS: batch.run,
            "bmm softmax, contiguous": lambda i: batch.products(batch.contiguous[i % len(batch.contiguous)]),
            # Half a rotation away from what ours has just touched.
            "index_select + bmm": lambda i: batch.products(batch.gathered(i + len(batch.pages) // 2)),
        },
        check=batch.check,
        ceilings=[Ceiling("matmul", shape.num_flops), Ceiling("read", shape.num_bytes)],
    )
