"""Caches of every form and page tables in CSR form, for the tests of the page functions."""

import torch

LAYOUTS = ["NHD", "HND"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
INDEX_DTYPES = [torch.int32, torch.int64]
PAGE_SIZES = [1, 5, 16]
CACHE_FORMS = ["combined", "tuple", "list", "page_slices", "apart"]
NUM_PAGES = 23


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def make_cache(form, layout, page_size, heads, dim, value_dim, dtype):
    """What is passed, and the key and value pages in NHD order. Filled with NaN: what nobody writes stays so."""
    order = (page_size, heads) if layout == "NHD" else (heads, page_size)
    nan = float("nan")
    if form == "combined":
        cache = torch.full((NUM_PAGES, 2, *order, dim), nan).to(dtype)
        pages = cache[:, 0], cache[:, 1]
    elif form == "page_slices":  # one layer of a tensor of three
        cache = torch.full((NUM_PAGES, 3, 2, *order, dim), nan).to(dtype)[:, 1]
        pages = cache[:, 0], cache[:, 1]
    elif form == "apart":  # keys and values of different strides
        keys = torch.full((NUM_PAGES, *order, dim), nan).to(dtype)
        values = torch.full((NUM_PAGES, *order, 2 * value_dim + 3), nan).to(dtype)[..., 1 : 1 + value_dim]
        cache = pages = keys, values
    else:
        pages = tuple(torch.full((NUM_PAGES, *order, d), nan).to(dtype) for d in (dim, value_dim))
        cache = list(pages) if form == "list" else pages
    return cache, [view if layout == "NHD" else view.transpose(1, 2) for view in pages]


def csr(rows, last_page_len, dtype=torch.int32, spare=3):
    """CSR tensors of one list of pages a request, with spare entries that name no page at all."""
    indptr = [0]
    for row in rows:
        indptr.append(indptr[-1] + len(row))
    indices = [page for row in rows for page in row] + [-7] * spare
    return ints(*indices, dtype=dtype), ints(*indptr, dtype=dtype), ints(*last_page_len, dtype=dtype)


def random_batch(page_size, seq_lens):
    """Pages in any order for requests of these lengths, all of different requests different."""
    free = torch.randperm(NUM_PAGES).tolist()
    rows = [[free.pop() for _ in range(-(-length // page_size))] for length in seq_lens]
    last = [length - (len(row) - 1) * page_size if row else 0 for length, row in zip(seq_lens, rows, strict=True)]
    return rows, last
