"""Moving tokens into caches of any strides by `store_kv`."""

from __future__ import annotations

import torch

from ...kernels.store_kv import store_kv

__all__ = ["store_tokens"]


def store_tokens(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    k_has_rows: bool,
    v_has_rows: bool,
    backend: str,
) -> None:
    """Writes k [T, H, D] and v [T, H, Dv] into the slots of k_cache [N, H, P, D] and v_cache [N, H, P, >= Dv].

    k_has_rows, v_has_rows: whether the last dims of both, tensor and cache, are contiguous. If not, it takes several
            moves, and tokens must not lie in the caches.
    Slots:  int64 [T]; all are checked before the first write.
    Raises: ValueError, as `store_kv`.
    """
    value_dim = v.shape[2]
    if v_cache.shape[3] != value_dim:
        v_cache = v_cache[..., :value_dim]
    if k_has_rows and v_has_rows:
        store_kv(k, v, k_cache, v_cache, slots, layout="HND", backend=backend)
        return
    _store_side(k, k_cache, slots, k_has_rows, backend)
    _store_side(v, v_cache, slots, v_has_rows, backend)


def _store_side(tokens: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, has_rows: bool, backend: str) -> None:
    # The other side of the move is as many rows of no elements.
    if has_rows:
        store_kv(tokens, tokens[..., :0], cache, cache[..., :0], slots, layout="HND", backend=backend)
        return
    for head in range(tokens.shape[1]):
        # Each element as a head of one element: the strides of heads are free, and nothing is copied to get there.
        elements, places = tokens[:, head].unsqueeze(-1), cache[:, head].unsqueeze(-1)
        store_kv(elements, elements[..., :0], places, places[..., :0], slots, backend=backend)
