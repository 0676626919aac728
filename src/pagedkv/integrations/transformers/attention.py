"""The attention function and the mask function registered with transformers under the name "pagedkv".

A call is paged when it carries a context (`model(..., pagedkv_step=step)`), and is what it always was when it does not:
it is the call that is paged, not the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .adapter import configs_of, fallback_attention, fallback_mask, register_attention, using_attention
from .options import AttentionArguments, read_arguments

__all__ = [
    "ATTENTION_NAME",
    "CONTEXT_ARGUMENT",
    "AttentionCall",
    "AttentionContext",
    "PackedStep",
    "paged_attention_implementation",
    "paged_call",
]

ATTENTION_NAME = "pagedkv"
CONTEXT_ARGUMENT = "pagedkv_step"

# True inside a packed, paged forward pass of this thread or task, where no mask is built.
_in_paged_call: ContextVar[bool] = ContextVar("pagedkv_in_paged_call", default=False)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One layer's call, of the new tokens alone.

    Shapes: query [1, Hq, T, D]; key [1, Hk, T, D]; value [1, Hk, T, Dv].
    """

    layer_idx: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    arguments: AttentionArguments


class AttentionContext(Protocol):
    """What a call carries to be paged."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """The result, [1, T, Hq, Dv]."""


class PackedStep(AttentionContext, Protocol):
    """A context that also says which tokens the call has: what `PagedModel.forward` runs. It serves as the cache, too.

    position_ids [T] int64; num_positions: one more than the highest of them, 0 for no tokens.
    """

    position_ids: torch.Tensor
    num_positions: int

    @property
    def num_tokens(self) -> int:
        """T, the new tokens of all sequences."""

    def last_rows(self) -> torch.Tensor:
        """The packed row of each sequence's last new token, [S] int64."""


@contextmanager
def paged_attention_implementation(model: Any) -> Iterator[None]:
    """Makes `model` look its attention up under our name until the end; calls without a context run as before."""
    with using_attention(configs_of(model), ATTENTION_NAME):
        yield


@contextmanager
def paged_call() -> Iterator[None]:
    """Marks this thread's forward pass as packed and paged, so that transformers builds no mask for it."""
    token = _in_paged_call.set(True)
    try:
        yield
    finally:
        _in_paged_call.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Called by every attention layer of a model; the signature is transformers'."""
    context: AttentionContext | None = given.pop(CONTEXT_ARGUMENT, None)
    if context is None:
        run = fallback_attention(module)
        return run(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **given)  # type: ignore[no-any-return]
    arguments = read_arguments(module, attention_mask, scaling, dropout, given)
    layer_idx = getattr(module, "layer_idx", None)
    if layer_idx is None:
        raise ValueError(f"{type(module).__name__} must have a layer_idx in a paged call, got none.")
    return context.attend(AttentionCall(layer_idx, query, key, value, arguments)), None


def _mask(*args: Any, config: Any = None, attention_mask: Any = None, use_vmap: bool = False, **kwargs: Any) -> Any:
    """Called where a model makes its masks; the signature is transformers'."""
    if not _in_paged_call.get():
        build = fallback_mask(config)
        if build is None:
            return None
        return build(*args, config=config, attention_mask=attention_mask, use_vmap=use_vmap, **kwargs)
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention_mask must be all ones in a packed, paged call, got zeros. Leave padding out.")
    if use_vmap:
        raise ValueError("the model must be plainly causal in a paged call, got a mask of its own on top.")
    return None


register_attention(ATTENTION_NAME, _attention, _mask)
