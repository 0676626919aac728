"""Random batches in FlashInfer's terms: CSR page tables, caches of every form, and what the oracle says of them."""

import itertools

import torch
from oracle import attend

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def tolerances(dtype):
    """Inputs are exact in dtype: one rounding to it and back, and float32 sums over up to 256 columns before."""
    error = 2 * torch.finfo(dtype).eps + 256 * torch.finfo(torch.float32).eps
    return {"rtol": error, "atol": error}


def assert_near(result, expected, dtype):
    """LSE and outputs against float64."""
    torch.testing.assert_close(result.double(), expected, check_dtype=False, **tolerances(dtype))


LSE_TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}  # float32 logits of sums over up to 256 columns


class Batch:
    """Sequences with their keys and values, in pages in random order; unused slots are NaN."""

    def __init__(
        self,
        q_lens,
        kv_lens,
        *,
        page_size=16,
        num_kv_heads=2,
        group=2,
        head_dim=64,
        value_dim=None,
        dtype=torch.float16,
        layout="NHD",
        index_dtype=torch.int32,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.q_lens, self.kv_lens, self.page_size, self.layout, self.dtype = q_lens, kv_lens, page_size, layout, dtype
        self.num_kv_heads, self.num_q_heads = num_kv_heads, num_kv_heads * group
        self.head_dim, self.value_dim = head_dim, value_dim or head_dim

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        pages = [-(-kv_len // page_size) for kv_len in kv_lens]
        num_pages = sum(pages) + 3
        order = torch.randperm(num_pages, generator=generator)[: sum(pages)]
        self.qo_indptr = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=index_dtype)
        self.kv_indptr = torch.tensor([0, *itertools.accumulate(pages)], dtype=index_dtype)
        # More entries than needed, as engines keep them.
        self.kv_indices = torch.cat([order, torch.tensor([-7, 1 << 20])]).to(index_dtype)
        self.last_page_len = torch.tensor(
            [(kv_len - 1) % page_size + 1 if kv_len else 0 for kv_len in kv_lens], dtype=index_dtype
        )
        self.q = randn(sum(q_lens), self.num_q_heads, head_dim)
        self.keys = [randn(n, num_kv_heads, head_dim) for n in kv_lens]
        self.values = [randn(n, num_kv_heads, self.value_dim) for n in kv_lens]
        nan = float("nan")
        self.key_pages = torch.full((num_pages, page_size, num_kv_heads, head_dim), nan, dtype=dtype)
        self.value_pages = torch.full((num_pages, page_size, num_kv_heads, self.value_dim), nan, dtype=dtype)
        for row, kv_len in enumerate(kv_lens):
            for t in range(kv_len):
                page = int(self.kv_indices[int(self.kv_indptr[row]) + t // page_size])
                self.key_pages[page, t % page_size] = self.keys[row][t]
                self.value_pages[page, t % page_size] = self.values[row][t]
        if layout == "HND":
            self.key_pages = self.key_pages.transpose(1, 2).contiguous()
            self.value_pages = self.value_pages.transpose(1, 2).contiguous()

    @property
    def table(self):
        """The three arrays of the page table."""
        return self.kv_indptr, self.kv_indices, self.last_page_len

    @property
    def pair(self):
        """The cache as a tuple."""
        return self.key_pages, self.value_pages

    @property
    def combined(self):
        """The cache as one tensor."""
        return torch.stack([self.key_pages, self.value_pages], dim=1)

    def expected(self, *, masks=None, **options):
        """(out, lse) of all rows, float64, LSE base 2."""
        outs, lses = [], []
        for row, (q_len, start) in enumerate(zip(self.q_lens, self.qo_indptr.tolist(), strict=False)):
            mask = None if masks is None else masks[row]
            out, lse = attend(self.q[start : start + q_len], self.keys[row], self.values[row], mask=mask, **options)
            outs.append(out)
            lses.append(lse)
        if not outs:
            return self.q.new_zeros(0, self.num_q_heads, self.value_dim).double(), self.q.new_zeros(0, self.num_q_heads)
        return torch.cat(outs), torch.cat(lses)

    def random_masks(self, seed=1):
        """One [q_len, kv_len] bool a sequence, some rows all masked."""
        generator = torch.Generator().manual_seed(seed)
        masks = [torch.rand(q, k, generator=generator) < 0.6 for q, k in zip(self.q_lens, self.kv_lens, strict=True)]
        for mask in masks:
            mask[1:2] = False
        return masks

    def assert_close(self, result, expected):
        """(out, lse) against the oracle's."""
        assert_near(result[0], expected[0], self.dtype if result[0].dtype == self.dtype else result[0].dtype)
        torch.testing.assert_close(result[1].double(), expected[1].double(), **LSE_TOLERANCES)
