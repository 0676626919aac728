"""Tables that are made once and kept for all later calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch

__all__ = ["kept_tensors"]


class _NotToKeepError(Exception):
    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.tensors = tensors


def kept_tensors(
    maxsize: int,
) -> Callable[[Callable[..., tuple[torch.Tensor, ...]]], Callable[..., tuple[torch.Tensor, ...]]]:
    """Keeps what a function of hashable arguments makes, like lru_cache, for callers in any mode of torch.

    A tensor that is made while something traces or transforms the caller (fake tensors, torch.export, torch.func) may
    only stand for one; it serves that call and is not kept. Inference mode of the first caller does not stick either.
    """

    def decorate(make: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
        @lru_cache(maxsize)
        def kept(*arguments: Hashable) -> tuple[torch.Tensor, ...]:
            with torch.inference_mode(False):
                tensors = make(*arguments)
            if not all(map(_is_real, tensors)):
                raise _NotToKeepError(tensors)
            return tensors

        def call(*arguments: Hashable) -> tuple[torch.Tensor, ...]:
            try:
                return kept(*arguments)
            except _NotToKeepError as made:
                return made.tensors

        return call

    return decorate


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one, with memory of its own, and not the stand-in of a trace or a transform."""
    if type(tensor) is not torch.Tensor:
        return False
    try:
        # What a transform wraps has no address to give, and says so.
        return tensor.data_ptr() != 0 or not tensor.numel() or tensor.is_meta
    except RuntimeError:
        return False
