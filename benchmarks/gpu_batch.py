"""Batches of equal sequences on shuffled pages of a GPU, and the truth about some of their rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import pagedkv
from pagedkv.spec import SCALED_DTYPES

from .case import WrongResultError, dtype_label
from .paged_kv import token_bytes

__all__ = ["GpuBatch", "GpuShape", "LatentBatch", "check_rows", "page_table"]

# Rows that are checked, of the first and the last sequence: the rule of the conformance cases holds for each.
_CHECKED_ROWS = 4


@dataclass(frozen=True)
class GpuShape:
    """S sequences, each with q_len new tokens on kv_len; dtype is that of the pages, queries are bfloat16."""

    num_seqs: int
    kv_len: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    q_len: int = 1
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 16
    has_scales: bool = True

    def tiny(self) -> GpuShape:
        """The same kind of batch, as small as it makes sense: for the interpreter."""
        q_len, kv_len = min(self.q_len, 20), 20 if self.q_len == self.kv_len else 37
        few = min(self.num_seqs, 2)
        return replace(self, num_seqs=few, q_len=q_len, kv_len=kv_len, num_q_heads=4, num_kv_heads=2, head_dim=32)

    def __str__(self) -> str:
        heads = f"{self.num_q_heads}/{self.num_kv_heads}/{self.head_dim}"
        dtype = dtype_label(self.dtype) + ("" if self.is_scaled or self.dtype not in SCALED_DTYPES else "-no-scales")
        new = f"q{self.q_len}-" if self.q_len > 1 else ""
        return f"S{self.num_seqs}-{new}ctx{self.kv_len}-{heads}-{dtype}-P{self.page_size}"

    @property
    def is_scaled(self) -> bool:
        """Whether each token and head has a scale."""
        return self.has_scales and self.dtype in SCALED_DTYPES

    @property
    def num_bytes(self) -> int:
        """Keys and values of the batch, and their scales."""
        tokens = self.num_seqs * self.kv_len
        unscaled = 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return tokens * (token_bytes(self.num_kv_heads, self.head_dim, self.dtype) if self.is_scaled else unscaled)

    @property
    def num_flops(self) -> int:
        """Q.K and P.V over the keys that causal rows see."""
        visible = self.q_len * self.kv_len - self.q_len * (self.q_len - 1) // 2
        return 4 * self.num_seqs * self.num_q_heads * self.head_dim * visible


def page_table(num_seqs: int, kv_len: int, page_size: int, device: torch.device) -> tuple[torch.Tensor, object]:
    """rows [S, pages of a sequence] int64 on the device, in random order, and the table of them."""
    pages_each = -(-kv_len // page_size)
    rows = torch.randperm(num_seqs * pages_each).view(num_seqs, pages_each)
    table = pagedkv.PageTable.from_rows(rows.tolist(), [kv_len] * num_seqs, page_size, device=device)
    return rows.to(device), table


class GpuBatch:
    """Query, pages [N, P, Hk, D] and scales [N, Hk, P] full of random numbers, and the plan over them."""

    def __init__(self, shape: GpuShape, device: torch.device, backend: str) -> None:
        self.shape, self._backend = shape, backend
        self.rows, self.table = page_table(shape.num_seqs, shape.kv_len, shape.page_size, device)
        self.query_indptr = torch.arange(shape.num_seqs + 1, dtype=torch.int32, device=device) * shape.q_len
        self.plan = self.make_plan()
        num_pages = self.rows.numel()
        pages = (num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)
        self.key, self.value = (_random_codes(pages, shape.dtype, device) for _ in range(2))
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None
        if shape.is_scaled:
            scales = (num_pages, shape.num_kv_heads, shape.page_size)
            largest = 127 if shape.dtype == torch.int8 else 4
            self.key_scales, self.value_scales = ((torch.rand(scales, device=device) + 0.5) / largest for _ in range(2))
        query = torch.randn(shape.num_seqs * shape.q_len, shape.num_q_heads, shape.head_dim, device=device)
        self.query = query.to(torch.bfloat16)
        self.out = torch.empty_like(self.query)

    def make_plan(self) -> pagedkv.AttentionPlan:
        """The plan of the batch, made anew."""
        shape = self.shape
        return pagedkv.plan_attention(
            self.query_indptr,
            self.table,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )

    def run(self, i: int) -> object:
        """Ours."""
        return pagedkv.paged_attention(
            self.query,
            self.key,
            self.value,
            self.plan,
            key_scales=self.key_scales,
            value_scales=self.value_scales,
            out=self.out,
            backend=self._backend,
        )

    def tokens(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What keys and values of one sequence stand for, [kv_len, Hk, D] float64."""
        pages, length = self.rows[sequence], self.shape.kv_len
        taken = []
        for codes, scales in ((self.key, self.key_scales), (self.value, self.value_scales)):
            numbers = codes[pages].double().flatten(0, 1)[:length]
            if scales is not None:
                numbers = numbers * scales[pages].transpose(1, 2).flatten(0, 1)[:length, :, None]
            taken.append(numbers)
        return taken[0], taken[1]

    def contiguous(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [S, Hk, kv_len, D] as a peer without pages takes them."""
        taken = (
            codes[self.rows.flatten()].view(self.shape.num_seqs, -1, *codes.shape[2:])[:, : self.shape.kv_len]
            for codes in (self.key, self.value)
        )
        key, value = (tokens.transpose(1, 2).contiguous() for tokens in taken)
        return key, value

    def check(self) -> None:
        """Compares some rows with float64."""
        self.out.fill_(torch.nan)
        self.run(0)
        shape = self.shape
        for sequence in {0, shape.num_seqs - 1}:
            key, value = self.tokens(sequence)
            rows = torch.linspace(0, shape.q_len - 1, min(shape.q_len, _CHECKED_ROWS), device=key.device).long()
            at = sequence * shape.q_len + rows
            scale = shape.head_dim**-0.5
            check_rows(self.out[at], self.query[at], rows + shape.kv_len - shape.q_len, key, value, scale)


class LatentBatch:
    """One new token a sequence on latents and rope keys side by side, [N, P, C + R], as MLAPool holds them."""

    def __init__(
        self,
        num_seqs: int,
        kv_len: int,
        num_heads: int,
        device: torch.device,
        backend: str,
        *,
        widths: tuple[int, int] = (512, 64),
        page_size: int = 64,
    ) -> None:
        self._backend, self._scale, self.num_heads, self.widths = backend, 192**-0.5, num_heads, widths
        self.num_seqs, self.kv_len = num_seqs, kv_len
        self.rows, table = page_table(num_seqs, kv_len, page_size, device)
        self.plan = pagedkv.plan_attention(
            torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
            table,
            num_q_heads=num_heads,
            num_kv_heads=1,
            head_dim=sum(widths),
            value_dim=widths[0],
        )
        self.pages = torch.randn(self.rows.numel(), page_size, sum(widths), device=device).to(torch.bfloat16)
        self.query = torch.randn(num_seqs, num_heads, sum(widths), device=device).to(torch.bfloat16)
        self.q_latent, self.q_rope = (part.contiguous() for part in self.query.split(list(widths), 2))
        self.out = torch.empty_like(self.q_latent)

    @property
    def num_flops(self) -> int:
        """Every head's product with latent and rope key, and its sum of latents."""
        latent, rope = self.widths
        return 2 * self.num_seqs * self.kv_len * self.num_heads * (2 * latent + rope)

    def run(self, i: int) -> object:
        """Ours."""
        latent = self.widths[0]
        return pagedkv.mla_attention(
            self.q_latent,
            self.q_rope,
            self.pages[..., :latent],
            self.pages[..., latent:],
            self.plan,
            sm_scale=self._scale,
            out=self.out,
            backend=self._backend,
        )

    def check(self) -> None:
        """Compares the first and the last sequence with float64."""
        self.out.fill_(torch.nan)
        self.run(0)
        for sequence in {0, self.num_seqs - 1}:
            key = self.pages[self.rows[sequence]].flatten(0, 1)[: self.kv_len].double()[:, None]
            at = torch.tensor([sequence], device=key.device)
            position = torch.tensor([self.kv_len - 1], device=key.device)
            check_rows(self.out[at], self.query[at], position, key, key[..., : self.widths[0]], self._scale)


def check_rows(
    out: torch.Tensor,
    query: torch.Tensor,
    positions: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> None:
    """Rows may err at most twice as far from float64 as torch in float32, plus one rounding of their dtype.

    Shapes: out [n, Hq, Dv]; query [n, Hq, D]; positions [n]; key [L, Hk, D] and value [L, Hk, Dv] float64.
    Raises: WrongResultError.
    """
    truth = _attention(query.double(), positions, key, value, scale)
    plain = _attention(query.float(), positions, key.float(), value.float(), scale)
    rounding = torch.finfo(out.dtype).eps * float(truth.abs().max())
    allowed = 2 * float((plain.double() - truth).abs().max()) + rounding
    error = float((out.double() - truth).abs().max())
    if not error <= allowed:
        raise WrongResultError(f"off by {error:.3g}, allowed are {allowed:.3g}")


def _attention(
    query: torch.Tensor, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    hidden = torch.arange(key.shape[0], device=key.device) > positions[:, None]
    heads = []
    for head in range(key.shape[1]):
        rows = query[:, head * group : (head + 1) * group]
        logits = torch.einsum("nhd,ld->nhl", rows, key[:, head]) * scale
        heads.append(torch.softmax(logits.masked_fill(hidden[:, None], -torch.inf), 2) @ value[:, head])
    return torch.cat(heads, 1)


def _random_codes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device)
    if dtype == torch.bfloat16:
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=torch.bfloat16, device=device).to(dtype)
