"""The only module that touches parts of transformers that move between its versions.

What is relied on: the attention and mask registries, `_attn_implementation` of configs, the cache layer classes and the
layer types of a config. Everything else in this package goes through here.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = [
    "Cache",
    "CacheLayerMixin",
    "DummyLayer",
    "PreTrainedModel",
    "configs_of",
    "fallback_attention",
    "fallback_mask",
    "layer_types",
    "register_attention",
    "text_config",
    "uses_attention_interface",
    "using_attention",
]

_FALLBACK = "sdpa"


@dataclass(eq=False)
class _Change:
    """What a config said before `using_attention` changed it, and the callers that are inside."""

    before: str | None
    users: set[object] = field(default_factory=set)


# By id of the config.
_changed: dict[int, _Change] = {}
_changed_lock = threading.Lock()


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Adds a name to the registries of attention and mask functions; no model uses it until its config says so."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def text_config(config: Any) -> Any:
    """The config of the text decoder, which is `config` itself for a text model."""
    return config.get_text_config(decoder=True)


def layer_types(config: Any) -> tuple[list[str], list[int | None]]:
    """Type and window of each layer; the type "dummy" stores nothing of its own."""
    types, kwargs = get_layer_types_and_kwargs(text_config(config))
    return list(types), [layer.get("sliding_window") for layer in kwargs]


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the model looks its attention function up in the registry."""
    return bool(model._can_set_attn_implementation())


def configs_of(model: PreTrainedModel) -> list[Any]:
    """The distinct configs whose attention implementation decides what modules of `model` call."""
    found = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())


@contextmanager
def using_attention(configs: list[Any], name: str) -> Iterator[None]:
    """Makes the configs name another attention function, and undoes it at the end, also after an error or an interrupt.

    Threads: a config is shared by all users of a model, so the change is seen by them for as long as the first and the
             last caller are inside; that is why the registered functions fall back to what the config said before.
    """
    user = object()
    try:
        for config in configs:
            with _changed_lock:
                change = _changed.setdefault(id(config), _Change(config._attn_implementation_internal))
                change.users.add(user)
                config._attn_implementation_internal = name
        yield
    finally:
        # Of any config, wherever the loop above was stopped: to take out a user who never came in changes nothing.
        for config in configs:
            with _changed_lock:
                _leave(config, user)


def _leave(config: Any, user: object) -> None:
    change = _changed.get(id(config))
    if change is None:
        return
    change.users.discard(user)
    if not change.users:
        config._attn_implementation_internal = change.before
        del _changed[id(config)]


def fallback_attention(module: torch.nn.Module) -> Callable[..., Any]:
    """The attention function the module would call had its config not been changed; SDPA when that is not known."""
    name = _implementation_before(getattr(module, "config", None))
    if name == "eager":
        eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager  # type: ignore[no-any-return]
    return AttentionInterface._global_mapping.get(name, sdpa_attention_forward)  # type: ignore[no-any-return]


def fallback_mask(config: Any) -> Callable[..., Any] | None:
    """The mask function that goes with `fallback_attention`; None where that attention builds no mask."""
    name = _implementation_before(config)
    if name == _FALLBACK:
        return sdpa_mask  # type: ignore[no-any-return]
    return AttentionMaskInterface._global_mapping.get(name)  # type: ignore[no-any-return]


def _implementation_before(config: Any) -> str:
    with _changed_lock:
        change = _changed.get(id(config))
    return (change.before if change else None) or _FALLBACK
