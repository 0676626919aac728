"""FlashInfer's page functions: where new tokens go, appending them, and how long each request is.

Four of the names take two forms of page table: CSR arrays, or one padded row of pages a request, here called dense.
The arguments tell which, see `_or_dense`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ...kernels.store_kv import store_kv
from ...kernels.store_mla import store_mla
from ...shapes import Shapes, check_int
from ...spec import CACHE_DTYPES
from .arguments import check_result_buffer
from .layouts import PagedCache
from .page_dense import append_dense, append_dense_mla, dense_batch_indices_positions, dense_seq_lens
from .page_slots import (
    check_dtypes,
    check_rows,
    check_starts,
    csr_slots,
    fitting,
    int64_indices,
    kv_pages,
    lengths,
)
from .tables import page_table as csr_table
from .vendor_only import Refused, lookup

__all__ = [
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "block_sparse_indices_to_vector_sparse_offsets",
    "get_batch_indices_positions",
    "get_seq_lens",
]

Result = TypeVar("Result")


def _or_dense(dense: Callable[..., Result], tell: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Lets a function of CSR arrays take the arguments of `dense` too; its signature stays that of CSR.

    Rule: the form is dense if an argument is passed by a name that only `dense` has, or if the positional argument of
          index `tell`, 1-D in the CSR form, has more dims: a page table or a cache (of a pair the first tensor counts).
    """

    def decorate(csr: Callable[..., Result]) -> Callable[..., Result]:
        dense_names = inspect.signature(dense).parameters.keys() - inspect.signature(csr).parameters.keys()

        @functools.wraps(csr)
        def either(*args: Any, **kwargs: Any) -> Result:
            telling = args[tell] if len(args) > tell else None
            if isinstance(telling, (tuple, list)) and telling:
                telling = telling[0]
            is_dense = isinstance(telling, torch.Tensor) and telling.dim() > 1
            form = dense if is_dense or not dense_names.isdisjoint(kwargs) else csr
            return form(*args, **kwargs)

        return either

    return decorate


@_or_dense(dense_batch_indices_positions, tell=0)
def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The request of each new token and its place in that request.

    Shapes: append_indptr [B + 1]; seq_lens [B], the lengths after the append; int32 or int64. Both results are [nnz]
            int32, written into batch_indices and positions where these are given.
    Rule:   the last new token of request b is at seq_lens[b] - 1. Entries beyond append_indptr[-1] are padding: -1, 0.
            A length below the number of new tokens gives negative positions, which an append refuses.
    Dense:  (page_table [B, M], last_page_len [B], page_size) gives arange(B) and the place of one new token a request,
            see `append_paged_kv_cache`.
    Raises: ValueError, TypeError for what breaks the lines above, before anything is written.

    >>> indptr, seq_lens = torch.tensor([0, 1, 3]), torch.tensor([5, 5])
    >>> [result.tolist() for result in get_batch_indices_positions(indptr, seq_lens, nnz=4)]
    [[0, 1, 1, -1], [4, 3, 4, 0]]
    """
    check_int("nnz", nnz, minimum=0)
    starts = int64_indices("append_indptr", append_indptr)
    device = starts.device
    lens = int64_indices("seq_lens", seq_lens).to(device)
    fitting("seq_lens", lens, torch.int32)
    check_starts("append_indptr", starts, lens, "seq_lens")
    if int(starts[0]) != 0:
        raise ValueError(f"append_indptr must start with 0, got {int(starts[0])}.")
    if int(starts[-1]) > nnz:
        raise ValueError(f"nnz must be at least append_indptr[-1] = {int(starts[-1])}, got {nnz}.")
    for name, buffer in (("batch_indices", batch_indices), ("positions", positions)):
        if buffer is not None:
            check_result_buffer(name, buffer, (nnz,), torch.int32, device)
    tokens = torch.arange(nnz, device=device)
    rows = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
    # One entry more than requests: the shift of padding, which lies beyond the last request.
    shifts = torch.nn.functional.pad(lens - starts[1:], (0, 1))
    is_padding = rows == starts.shape[0] - 1
    found = rows.masked_fill(is_padding, -1), (tokens + shifts[rows]).masked_fill(is_padding, 0)
    buffers = batch_indices, positions
    of_requests, places = (v.to(torch.int32) if b is None else b.copy_(v) for b, v in zip(buffers, found, strict=True))
    return of_requests, places


@_or_dense(dense_seq_lens, tell=0)
def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """The tokens of each request, [B] in the dtype of the arguments.

    Shapes: kv_indptr [B + 1]; kv_last_page_len [B] in 1..page_size; int32 or int64.
    Rule:   (pages - 1) * page_size + kv_last_page_len; 0 for a request without pages, whatever kv_last_page_len says.
    Dense:  (page_table [B, M], last_page_len [B] in 0..page_size, page_size); entries below 0 are no pages.
    Raises: ValueError, TypeError for what breaks the lines above, and for a length that the dtype cannot hold.

    >>> get_seq_lens(torch.tensor([0, 3, 4, 4]), torch.tensor([13, 8, 0]), 16).tolist()
    [45, 8, 0]
    """
    check_int("page_size", page_size, minimum=1)
    starts = int64_indices("kv_indptr", kv_indptr)
    last = int64_indices("kv_last_page_len", kv_last_page_len).to(starts.device)
    check_starts("kv_indptr", starts, last, "kv_last_page_len")
    num_pages = starts[1:] - starts[:-1]
    check_rows("kv_last_page_len", last, (num_pages > 0) & ((last < 1) | (last > page_size)), f"in 1..{page_size}")
    return lengths(num_pages, last, page_size, torch.promote_types(kv_indptr.dtype, kv_last_page_len.dtype))


@_or_dense(append_dense, tell=2)
def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Writes the keys and values of new tokens into the pages of their requests, in place.

    Shapes: append_key [T, Hk, D]; append_value [T, Hk, Dv]; batch_indices and positions [T], see
            `get_batch_indices_positions`; kv_indices [>= kv_indptr[-1]]; kv_indptr [B + 1]; kv_last_page_len [B] in
            1..page_size; int32 or int64. paged_kv_cache as in `unpack_paged_kv_cache`. Last dims are contiguous, other
            strides are free and may differ between keys and values. One dtype.
    Rule:   a token goes to the page of its request that holds its position. A token of request -1 is skipped.
            Two tokens of one place: the last one wins.
    When:   the page table already includes the new tokens.
    Dense:  (new_k [B, Hk, D], new_v [B, Hk, Dv], kv_cache [N, 2, P, Hk, D], page_table [B, M], last_page_len [B],
            page_size, kv_layout="NHD"): one new token a request. Entries of page_table below 0 pad the end of a row.
            last_page_len counts the tokens before the append, 0..page_size - 1: the new one is at
            (pages - 1) * page_size + last_page_len.
    Raises: ValueError, TypeError, KeyError (kv_layout) for what breaks the lines above, a page that the cache does not
            have, and a place beyond the pages of its request; nothing is written then.
    """
    shapes = Shapes()
    key_pages, value_pages = kv_pages(shapes, paged_kv_cache, kv_layout, "paged_kv_cache")
    shapes.check("append_key", append_key, "T Hk D")
    shapes.check("append_value", append_value, "T Hk Dv")
    check_dtypes(key_pages.dtype, "paged_kv_cache", append_key=append_key, append_value=append_value)
    table = csr_table(kv_indptr, kv_indices, kv_last_page_len, shapes["P"], key_pages.device)
    slots = csr_slots(shapes, table, batch_indices, positions, "paged_kv_cache")
    store_kv(append_key, append_value, key_pages, value_pages, slots, layout=kv_layout)


@_or_dense(append_dense_mla, tell=2)
def append_paged_mla_kv_cache(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor | None,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: torch.Tensor | None,
    kpe_cache: torch.Tensor | None,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> None:
    """Writes the latents and rope keys of new tokens into the pages of their requests, in place.

    Shapes: append_ckv [T, C]; append_kpe [T, R]; ckv_cache [N, P, C]; kpe_cache [N, P, R], often views of one
            [N, P, C + R]; the rest as in `append_paged_kv_cache`. R may be 0: append_kpe, kpe_cache None or of width 0.
    Rule:   as in `append_paged_kv_cache`. A cache that is None is not written, and what is appended to it is not read.
    Dense:  (new_k [B, H, D], new_v [B, H, Dv], mla_kv_cache [N, P, H, D + Dv], page_table, last_page_len, page_size):
            one new token a request, its key first in the last dim; the rest as in `append_paged_kv_cache`.
    Raises: ValueError, TypeError as in `append_paged_kv_cache`, and if both caches are None; nothing is written then.
    """
    # A name, what is appended, and its cache. Of width 0 there is nothing to append.
    parts: list[tuple[str, Any, torch.Tensor]] = [
        (name, new, pages)
        for name, new, pages in (("ckv", append_ckv, ckv_cache), ("kpe", append_kpe, kpe_cache))
        if pages is not None and not (new is None and pages.shape[-1:] == (0,))
    ]
    if not parts:
        raise ValueError("ckv_cache or kpe_cache must be a tensor with entries, got none.")
    owner, latent, latent_pages = parts[0]
    _, rope, rope_pages = parts[1] if len(parts) == 2 else (None, None, None)
    shapes = Shapes()
    for name, new, pages in parts:
        shapes.check(f"{name}_cache", pages, f"N P {name}")
        shapes.check(f"append_{name}", new, f"T {name}")
        check_dtypes(latent_pages.dtype, f"{owner}_cache", **{f"{name}_cache": pages, f"append_{name}": new})
    table = csr_table(kv_indptr, kv_indices, kv_last_page_len, shapes["P"], latent_pages.device)
    slots = csr_slots(shapes, table, batch_indices, positions, f"{owner}_cache")
    if latent_pages.dtype in CACHE_DTYPES or rope is None or rope_pages is None:
        store_mla(latent, rope, latent_pages, rope_pages, slots)
    else:
        # Numbers of 8 bits are moved as they are: one head, whose keys are latents and whose values are rope keys.
        store_kv(latent[:, None], rope[:, None], latent_pages[:, :, None], rope_pages[:, :, None], slots)


def block_sparse_indices_to_vector_sparse_offsets(
    block_sparse_indices: torch.Tensor,
    block_sparse_indptr: torch.Tensor,
    vector_sparse_offsets: torch.Tensor,
    vector_sparse_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    stride_block: int,
    stride_n: int,
    block_size: int,
) -> torch.Tensor:
    """The offset of each token of each row, from the blocks that a row names.

    Shapes: block_sparse_indices [>= block_sparse_indptr[-1]]; vector_sparse_offsets [>= vector_sparse_indptr[-1]]; both
            indptr [B + 1]; kv_lens [B]; int32 or int64.
    Rule:   token i of row b is at its block * stride_block + (i % block_size) * stride_n, written to entry
            vector_sparse_indptr[b] + i of vector_sparse_offsets; other entries stay as they are.
    Returns: vector_sparse_offsets. For block_size 1 nothing is written: block_sparse_indices times stride_block.
    Raises: ValueError, TypeError for what breaks the lines above, for a row with more tokens than its blocks or its
            entries hold, and for an offset that the dtype cannot hold.
    """
    check_int("block_size", block_size, minimum=1)
    blocks = int64_indices("block_sparse_indices", block_sparse_indices)
    if block_size == 1:
        return fitting("block_sparse_indices", blocks * stride_block, block_sparse_indices.dtype)
    int64_indices("vector_sparse_offsets", vector_sparse_offsets)
    device = blocks.device
    lens = int64_indices("kv_lens", kv_lens).to(device)
    from_starts = int64_indices("block_sparse_indptr", block_sparse_indptr).to(device)
    to_starts = int64_indices("vector_sparse_indptr", vector_sparse_indptr).to(device)
    for name, starts, per_entry, held_by, held in (
        ("block_sparse_indptr", from_starts, block_size, "block_sparse_indices", blocks),
        ("vector_sparse_indptr", to_starts, 1, "vector_sparse_offsets", vector_sparse_offsets),
    ):
        check_starts(name, starts, lens, "kv_lens")
        if int(starts[0]) < 0 or int(starts[-1]) > held.shape[0]:
            raise ValueError(f"{name} must be in 0..{held.shape[0]} (the entries of {held_by}), got {starts.tolist()}.")
        is_bad = (lens < 0) | (lens > (starts[1:] - starts[:-1]) * per_entry)
        check_rows("kv_lens", lens, is_bad, f"between 0 and what its entries of {held_by} hold")
    rows = torch.repeat_interleave(torch.arange(lens.shape[0], device=device), lens)
    tokens = torch.arange(rows.shape[0], device=device) - (lens.cumsum(0) - lens)[rows]
    offsets = blocks[from_starts[rows] + tokens // block_size] * stride_block + tokens % block_size * stride_n
    offsets = fitting("vector_sparse_offsets", offsets, vector_sparse_offsets.dtype)
    at = to_starts[rows] + tokens
    vector_sparse_offsets[at.to(vector_sparse_offsets.device)] = offsets.to(vector_sparse_offsets.device)
    return vector_sparse_offsets


def __getattr__(name: str) -> Refused:
    """Names of one vendor's libraries: there to be imported, and refusing when used."""
    return lookup(name, __name__)
