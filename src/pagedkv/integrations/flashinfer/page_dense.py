"""The page functions for a dense page table: one padded row of pages a request, one new token each."""

from __future__ import annotations

import torch

from ...kernels.store_kv import store_kv
from ...shapes import Shapes
from .layouts import PagedCache
from .page_slots import check_dtypes, dense_rows, dense_slots, kv_pages, lengths

__all__ = ["append_dense", "append_dense_mla", "dense_batch_indices_positions", "dense_seq_lens"]


def dense_batch_indices_positions(
    page_table: torch.Tensor, last_page_len: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `page.get_batch_indices_positions`."""
    positions = dense_seq_lens(page_table, last_page_len, page_size).to(torch.int32)
    return torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device), positions


def dense_seq_lens(page_table: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """See `page.get_seq_lens`."""
    _, num_pages, last = dense_rows(page_table, last_page_len, page_size, page_table.device)
    return lengths(num_pages, last, page_size, torch.promote_types(page_table.dtype, last_page_len.dtype))


def append_dense(
    new_k: torch.Tensor,
    new_v: torch.Tensor,
    kv_cache: PagedCache,
    page_table: torch.Tensor,
    last_page_len: torch.Tensor,
    page_size: int,
    kv_layout: str = "NHD",
) -> None:
    """See `page.append_paged_kv_cache`."""
    shapes = Shapes()
    key_pages, value_pages = kv_pages(shapes, kv_cache, kv_layout, "kv_cache")
    shapes.check("new_k", new_k, "B Hk D")
    shapes.check("new_v", new_v, "B Hk Dv")
    check_dtypes(key_pages.dtype, "kv_cache", new_k=new_k, new_v=new_v)
    slots = dense_slots(shapes, page_table, last_page_len, page_size, key_pages.device, "kv_cache")
    store_kv(new_k, new_v, key_pages, value_pages, slots, layout=kv_layout)


def append_dense_mla(
    new_k: torch.Tensor,
    new_v: torch.Tensor,
    mla_kv_cache: torch.Tensor,
    page_table: torch.Tensor,
    last_page_len: torch.Tensor,
    page_size: int,
) -> None:
    """See `page.append_paged_mla_kv_cache`."""
    shapes = Shapes()
    shapes.check("new_k", new_k, "B H D")
    shapes.check("new_v", new_v, "B H Dv")
    shapes.bind("D+Dv", shapes["D"] + shapes["Dv"], "new_k and new_v")
    shapes.check("mla_kv_cache", mla_kv_cache, "N P H D+Dv")
    check_dtypes(mla_kv_cache.dtype, "mla_kv_cache", new_k=new_k, new_v=new_v)
    slots = dense_slots(shapes, page_table, last_page_len, page_size, mla_kv_cache.device, "mla_kv_cache")
    store_kv(new_k, new_v, mla_kv_cache[..., : shapes["D"]], mla_kv_cache[..., shapes["D"] :], slots)
