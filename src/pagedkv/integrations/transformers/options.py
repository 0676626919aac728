"""The keyword arguments models hand to an attention function: honoured, known to be harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["AttentionArguments", "read_arguments"]

# They describe the call, not the attention: positions went into the rotary embedding, the others ask for other outputs.
_HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "shared_kv_states",
        "use_cache",
    }
)


@dataclass(frozen=True, eq=False)
class AttentionArguments:
    """What a paged call honours. `window` counts keys, the row's own included; None is no window."""

    sm_scale: float | None
    window: int | None
    soft_cap: float
    sinks: torch.Tensor | None


def read_arguments(
    module: torch.nn.Module, attention_mask: object, scaling: float | None, dropout: float, given: Mapping[str, Any]
) -> AttentionArguments:
    """Sorts what arrived; an argument that is None or False asks for nothing.

    Raises: ValueError for anything that would change the result and is not supported: a mask, dropout, attention that
            is not causal, and every keyword this module does not know.
    """
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask must be None in a paged call, got {_describe(attention_mask)}. Leave padding out."
        )
    if dropout:
        raise ValueError(f"dropout must be 0 in a paged call, got {dropout}. Put the model in eval mode.")
    causal = given.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(
            "is_causal must be True in a paged call, got False. Keys of later tokens are not in the pages."
        )
    for name, value in given.items():
        if name not in _HONOURED and name not in _HARMLESS and value is not None and value is not False:
            raise ValueError(f"attention argument {name!r} must be absent in a paged call, got {_describe(value)}.")
    sinks = given.get("s_aux")
    if sinks is None:
        sinks = given.get("sinks")
    window = given.get("sliding_window")
    return AttentionArguments(
        sm_scale=None if scaling is None else float(scaling),
        window=None if window is None else int(window),
        soft_cap=float(given.get("softcap") or 0.0),
        sinks=None if sinks is None else sinks.detach().reshape(-1).to(torch.float32),
    )


_HONOURED = frozenset({"is_causal", "s_aux", "sinks", "sliding_window", "softcap"})


def _describe(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
