"""Where tokens go: the slots and lengths that FlashInfer's two forms of page table name, and the checks of both."""

from __future__ import annotations

import numpy as np
import torch

from ...kernels.pages import check_ids
from ...shapes import Shapes, check_int, dtype_name
from ...storage import PageTable
from .layouts import PagedCache, unpack_paged_kv_cache

__all__ = [
    "check_dtypes",
    "check_rows",
    "check_starts",
    "csr_slots",
    "dense_rows",
    "dense_slots",
    "fitting",
    "int64_indices",
    "kv_pages",
    "lengths",
]


def csr_slots(
    shapes: Shapes, table: PageTable, batch_indices: torch.Tensor, positions: torch.Tensor, owner: str
) -> torch.Tensor:
    """The slot of each token, [T] int64, -1 for those that are skipped; owner is the cache, of N pages of P tokens."""
    # Host arrays: every check looks at values, and a step on them costs a fraction of one on tensors.
    requests = int64_indices("batch_indices", batch_indices, "T", shapes).cpu().numpy()
    places = int64_indices("positions", positions, "T", shapes).cpu().numpy()
    if table.max_page >= shapes["N"]:
        check_ids("kv_indices", table.indices[: int(table.indptr[-1])], shapes["N"], owner)
    if requests.size and requests.max() >= table.num_seqs:
        raise ValueError(f"batch_indices must be below {table.num_seqs} (requests), got {requests.max()}.")
    kept = (requests >= 0).nonzero()[0]
    rows, places = requests[kept], places[kept]
    starts = table.indptr.cpu().numpy().astype(np.int64)
    num_held = (starts[1:] - starts[:-1])[rows] * table.page_size
    is_outside = (places < 0) | (places >= num_held)
    if is_outside.any():
        at = int(is_outside.argmax())
        raise ValueError(
            f"positions must be in [0, {num_held[at]}) (the pages of request {rows[at]}), "
            f"got {places[at]} at entry {kept[at]}."
        )
    pages, offsets = np.divmod(places, table.page_size)
    slots = np.full(requests.shape, -1)
    slots[kept] = table.indices.cpu().numpy()[starts[rows] + pages].astype(np.int64) * table.page_size + offsets
    return torch.from_numpy(slots).to(table.indptr.device)


def dense_slots(
    shapes: Shapes,
    page_table: torch.Tensor,
    last_page_len: torch.Tensor,
    page_size: int,
    device: torch.device,
    owner: str,
) -> torch.Tensor:
    """The slot of one new token a request, [B] int64; owner is the cache, of N pages of P tokens."""
    if page_size != shapes["P"]:
        raise ValueError(f"page_size must be {shapes['P']} (the tokens of a page of {owner}), got {page_size}.")
    shapes.check("page_table", page_table, "B M")
    rows, num_pages, last = dense_rows(page_table, last_page_len, page_size, device)
    check_ids("page_table", rows[rows >= 0], shapes["N"], owner)
    check_rows("page_table", num_pages, num_pages == 0, "a row with at least one page for its new token")
    check_rows("last_page_len", last, last == page_size, f"in 0..{page_size - 1} (its last page must have room)")
    return rows.gather(1, num_pages[:, None] - 1)[:, 0] * page_size + last


def dense_rows(
    page_table: torch.Tensor, last_page_len: torch.Tensor, page_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table, the pages of each row and the tokens of its last page, as int64."""
    check_int("page_size", page_size, minimum=1)
    shapes = Shapes()
    rows = int64_indices("page_table", page_table, "B M", shapes).to(device)
    last = int64_indices("last_page_len", last_page_len, "B", shapes).to(device)
    is_page = rows >= 0
    num_pages = is_page.sum(1)
    is_broken = (is_page[:, 1:] & ~is_page[:, :-1]).any(1)
    if bool(is_broken.any()):
        row = int(is_broken.int().argmax())
        raise ValueError(
            f"page_table of request {row} must have no page after an entry below 0, got {rows[row].tolist()}."
        )
    check_rows("last_page_len", last, (num_pages > 0) & ((last < 0) | (last > page_size)), f"in 0..{page_size}")
    return rows, num_pages, last


def kv_pages(shapes: Shapes, cache: PagedCache, kv_layout: str, owner: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value pages in kv_layout; binds N, P, Hk, D and Dv."""
    key_pages, value_pages = unpack_paged_kv_cache(cache, kv_layout)
    of_page = "P Hk" if kv_layout == "NHD" else "Hk P"
    shapes.check(f"keys of {owner}", key_pages, f"N {of_page} D")
    shapes.check(f"values of {owner}", value_pages, f"N {of_page} Dv")
    check_dtypes(key_pages.dtype, f"keys of {owner}", **{f"values of {owner}": value_pages})
    return key_pages, value_pages


def lengths(num_pages: torch.Tensor, last: torch.Tensor, page_size: int, dtype: torch.dtype) -> torch.Tensor:
    """The tokens of each request, 0 without pages."""
    return fitting("sequence lengths", ((num_pages - 1) * page_size + last).masked_fill(num_pages == 0, 0), dtype)


def int64_indices(name: str, indices: torch.Tensor, pattern: str = "B", shapes: Shapes | None = None) -> torch.Tensor:
    """As int64, whatever of int32 and int64 it was."""
    (Shapes() if shapes is None else shapes).check(name, indices, pattern)
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must have dtype int32 or int64, got {dtype_name(indices.dtype)}.")
    return indices.to(torch.int64)


def fitting(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In `dtype`, if no value is cut."""
    if dtype != torch.int64 and values.numel() and int(values.abs().max()) > torch.iinfo(dtype).max:
        raise ValueError(f"{name} must fit {dtype_name(dtype)}, got {int(values.abs().max())}.")
    return values.to(dtype)


def check_starts(name: str, starts: torch.Tensor, rows: torch.Tensor, owner: str) -> None:
    """Refuses what does not divide entries among as many rows as `owner` has."""
    if starts.shape[0] != rows.shape[0] + 1:
        raise ValueError(
            f"{name} must have shape [B + 1] with B = {rows.shape[0]} (set by {owner}), got {list(starts.shape)}."
        )
    if bool((starts[1:] < starts[:-1]).any()):
        raise ValueError(f"{name} must not decrease, got {starts.tolist()}.")


def check_rows(name: str, values: torch.Tensor, is_bad: torch.Tensor, rule: str) -> None:
    """Names the first request whose value breaks the rule."""
    if bool(is_bad.any()):
        row = int(is_bad.int().argmax())
        raise ValueError(f"{name} of request {row} must be {rule}, got {int(values[row])}.")


def check_dtypes(dtype: torch.dtype, owner: str, **tensors: torch.Tensor) -> None:
    """ValueError, as FlashInfer raises it."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ValueError(
                f"{name} must have dtype {dtype_name(dtype)} like {owner}, got {dtype_name(tensor.dtype)}."
            )
