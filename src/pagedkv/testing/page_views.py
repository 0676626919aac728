"""K/V pages in every memory form that callers pass: what a kernel must honour are strides, not one layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["PAGE_FORMS", "kv_page_views"]

Pair = tuple[torch.Tensor, torch.Tensor]


def kv_page_views(
    form: str,
    layout: str,
    *,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """Uninitialised key_pages [N, P, Hk, D] and value_pages [N, P, Hk, Dv] ("HND": [N, Hk, P, D]) in the form `form`.

    "separate" two tensors · "interleaved" views of one [N, 2, ...] · "page_first" the middle layer of three in
    [N, 3, 2, ...] · "sliced" odd offsets and gaps on every axis but the last.
    """
    value_dim = head_dim if value_dim is None else value_dim
    inner = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
    return PAGE_FORMS[form](num_pages, inner, head_dim, value_dim, dtype)


def _separate(num_pages: int, inner: tuple[int, int], head_dim: int, value_dim: int, dtype: torch.dtype) -> Pair:
    return (
        torch.empty(num_pages, *inner, head_dim, dtype=dtype),
        torch.empty(num_pages, *inner, value_dim, dtype=dtype),
    )


def _interleaved(num_pages: int, inner: tuple[int, int], head_dim: int, value_dim: int, dtype: torch.dtype) -> Pair:
    both = torch.empty(num_pages, 2, *inner, max(head_dim, value_dim), dtype=dtype)
    return both[:, 0, ..., :head_dim], both[:, 1, ..., :value_dim]


def _page_first(num_pages: int, inner: tuple[int, int], head_dim: int, value_dim: int, dtype: torch.dtype) -> Pair:
    layers = torch.empty(num_pages, 3, 2, *inner, max(head_dim, value_dim), dtype=dtype)
    return layers[:, 1, 0, ..., :head_dim], layers[:, 1, 1, ..., :value_dim]


def _sliced(num_pages: int, inner: tuple[int, int], head_dim: int, value_dim: int, dtype: torch.dtype) -> Pair:
    outer, middle = inner
    wide = torch.empty(num_pages + 1, outer + 2, middle + 1, head_dim + value_dim + 3, dtype=dtype)
    pages = wide[1:, 1:-1, 1:]
    return pages[..., 1 : 1 + head_dim], pages[..., 2 + head_dim : 2 + head_dim + value_dim]


PAGE_FORMS: dict[str, Callable[[int, tuple[int, int], int, int, torch.dtype], Pair]] = {
    "separate": _separate,
    "interleaved": _interleaved,
    "page_first": _page_first,
    "sliced": _sliced,
}
