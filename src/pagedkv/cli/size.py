"""`pagedkv size`: what a cache of a given geometry takes, and what fits into given memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ..shapes import dtype_name
from ..spec import KVCacheSpec, MLACacheSpec
from .units import format_bytes

__all__ = ["Spec", "describe_size", "spec_of_config", "spec_of_geometry"]

Spec = KVCacheSpec | MLACacheSpec


def spec_of_config(config: Any, *, dtype: torch.dtype | None, page_size: int | None, tp_size: int) -> Spec:
    """The spec of one tensor-parallel rank of a Hugging Face config; an MLA config gives an MLACacheSpec.

    page_size: None for the default of the kind of cache.
    """
    given: dict[str, Any] = {} if page_size is None else {"page_size": page_size}
    get_text_config = getattr(config, "get_text_config", None)
    text_config = config if get_text_config is None else get_text_config(decoder=True)
    if getattr(text_config, "kv_lora_rank", None):
        return MLACacheSpec.from_config(config, dtype=dtype, **given)
    return KVCacheSpec.from_config(config, tp_size, dtype=dtype, **given)


def spec_of_geometry(
    num_layers: int | None,
    num_kv_heads: int | None,
    head_dim: int | None,
    *,
    dtype: torch.dtype | None,
    page_size: int | None,
    tp_size: int,
) -> KVCacheSpec:
    """The spec of one tensor-parallel rank of a geometry given by hand; dtype None is float16."""
    if num_layers is None or num_kv_heads is None or head_dim is None:
        raise ValueError("geometry must be --model, or all of --layers, --kv-heads and --head-dim.")
    config = SimpleNamespace(num_hidden_layers=num_layers, num_key_value_heads=num_kv_heads, head_dim=head_dim)
    return KVCacheSpec.from_config(config, tp_size, dtype=dtype, page_size=16 if page_size is None else page_size)


def describe_size(
    spec: Spec, *, tp_size: int = 1, memory_bytes: int | None = None, num_tokens: int | None = None
) -> list[tuple[str, str]]:
    """The lines of the report, name and value; figures are of one rank."""
    rows = [("cache", _geometry(spec, tp_size)), ("dtype", _dtype(spec))]
    rows.append(("bytes per token", _exact(spec.bytes_per_token)))
    rows.append((f"bytes per page of {spec.page_size} tokens", _exact(spec.bytes_per_page)))
    if memory_bytes is not None:
        num_pages = spec.num_pages(memory_bytes)
        rows.append((f"pages in {format_bytes(memory_bytes)}", f"{num_pages:,}"))
        rows.append((f"tokens in {format_bytes(memory_bytes)}", f"{num_pages * spec.page_size:,}"))
    if num_tokens is not None:
        num_pages = -(-num_tokens // spec.page_size)
        rows.append((f"pages for {num_tokens:,} tokens", f"{num_pages:,}"))
        rows.append((f"memory for {num_tokens:,} tokens", _exact(num_pages * spec.bytes_per_page)))
    return rows


def _geometry(spec: Spec, tp_size: int) -> str:
    if isinstance(spec, MLACacheSpec):
        kind = f"latent {spec.latent_dim} + rope key {spec.rope_dim} a token (MLA), {spec.num_layers} layers"
        return kind if tp_size == 1 else f"{kind}, whole on each of {tp_size} ranks"
    layers = [layer for layer in spec.layers if layer.num_kv_heads]
    kinds = dict.fromkeys(
        f"{layer.num_kv_heads} KV heads x {layer.head_dim}"
        + (f" (values {layer.value_dim})" if layer.value_dim != layer.head_dim else "")
        for layer in layers
    )
    stores = f"{len(layers)} layers" if len(layers) == spec.num_layers else f"{len(layers)} of {spec.num_layers} layers"
    geometry = f"{' or '.join(kinds)}, {stores}"
    return geometry if tp_size == 1 else f"{geometry}, each of {tp_size} ranks"


def _dtype(spec: Spec) -> str:
    name = dtype_name(spec.dtype)
    has_scales = isinstance(spec, KVCacheSpec) and spec.has_scales
    return f"{name}, and a float32 scale for each token and head of K and of V" if has_scales else name


def _exact(num_bytes: int) -> str:
    return f"{num_bytes:,} ({format_bytes(num_bytes)})"
