"""FlashInfer's forms of a paged cache: one tensor or a pair, with short forms for pages of one token."""

from __future__ import annotations

import torch

__all__ = ["PagedCache", "check_kv_layout", "unpack_paged_kv_cache"]

PagedCache = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | list[torch.Tensor]


def check_kv_layout(kv_layout: str) -> str:
    """KeyError for an unknown one, as FlashInfer raises it."""
    if kv_layout not in ("NHD", "HND"):
        raise KeyError(f"kv_layout must be NHD or HND, got {kv_layout!r}.")
    return kv_layout


def unpack_paged_kv_cache(paged_kv_cache: PagedCache, kv_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value pages as views, each [N, P, Hk, D] ("HND": [N, Hk, P, D]).

    Shapes: one tensor [N, 2, P, Hk, D] ("HND": [N, 2, Hk, P, D]), keys first; or a pair of [N, P, Hk, D] ("HND":
            [N, Hk, P, D]). Pages of one token may leave P out: [N, 2, Hk, D], or a pair of [N, Hk, D].
    Raises: ValueError for another number of dims, or a second dim other than 2; TypeError for anything else.
    """
    check_kv_layout(kv_layout)
    if isinstance(paged_kv_cache, (tuple, list)):
        if len(paged_kv_cache) != 2:
            raise ValueError(f"paged_kv_cache must be a pair of keys and values, got {len(paged_kv_cache)} tensors.")
        keys, values = paged_kv_cache
        for name, pages in (("keys", keys), ("values", values)):
            if not isinstance(pages, torch.Tensor):
                raise TypeError(f"{name} of paged_kv_cache must be a tensor, got {type(pages).__name__}.")
            if pages.dim() not in (3, 4):
                raise ValueError(
                    f"{name} of paged_kv_cache must have 4 dims (3 for pages of one token), got {pages.dim()}."
                )
    elif isinstance(paged_kv_cache, torch.Tensor):
        if paged_kv_cache.dim() not in (4, 5):
            raise ValueError(f"paged_kv_cache must have 5 dims (4 for pages of one token), got {paged_kv_cache.dim()}.")
        if paged_kv_cache.shape[1] != 2:
            raise ValueError(
                f"dim 1 of paged_kv_cache must be 2, keys and values, got shape {list(paged_kv_cache.shape)}."
            )
        keys, values = paged_kv_cache.unbind(dim=1)
    else:
        raise TypeError(f"paged_kv_cache must be a tensor or a pair of tensors, got {type(paged_kv_cache).__name__}.")
    page_dim = 1 if kv_layout == "NHD" else 2
    if keys.dim() == 3:
        keys = keys.unsqueeze(page_dim)
    if values.dim() == 3:
        values = values.unsqueeze(page_dim)
    return keys, values
