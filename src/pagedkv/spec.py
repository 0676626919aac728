"""What a cache stores: geometry, dtype and byte counts of keys and values, before any memory is taken."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from .shapes import QUANTISED_DTYPES, check_choice, check_int, dtype_name

__all__ = ["CACHE_DTYPES", "SCALED_DTYPES", "KVCacheSpec", "LayerGeometry", "MLACacheSpec", "calc_kv_cache_memory"]

Layout = Literal["NHD", "HND"]
Order = Literal["layer_first", "page_first"]

CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Quantised with one float32 scale a token and head. float8_e5m2 has the range to do without.
SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn)

# Layer types of Hugging Face configs by what they leave behind: keys and values of every token, or no pages at all.
_STORING_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
_STATELESS_LAYER_TYPES = ("linear_attention", "conv", "mamba", "moe", "mlp")


class LayerGeometry(NamedTuple):
    """Heads and dims of one layer; `num_kv_heads` 0 is a layer that stores nothing."""

    num_kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def num_elements(self) -> int:
        """Elements of K and V of one token."""
        return self.num_kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class KVCacheSpec:
    """Geometry of a K/V cache with per-head keys and values (MHA, GQA, MQA).

    num_kv_heads, head_dim and value_dim are one int for all layers or one int a layer. value_dim defaults to head_dim.
    dtype is float32, float16, bfloat16 or quantised: int8 and float8_e4m3fn add a float32 scale for each token and head
    of K and of V, float8_e5m2 none.
    Units:  page_size counts tokens; byte properties count K and V of all layers together, scales included.
    Raises: ValueError or TypeError when a field is not usable, naming the field.

    >>> spec = KVCacheSpec(num_layers=30, num_kv_heads=3, head_dim=64, dtype=torch.bfloat16)
    >>> spec.bytes_per_token
    23040
    >>> spec.num_pages(2**30)
    2912
    """

    num_layers: int
    num_kv_heads: int | tuple[int, ...]
    head_dim: int | tuple[int, ...]
    page_size: int = 16
    dtype: torch.dtype = torch.float16
    layout: Layout = "NHD"
    order: Order = "layer_first"
    value_dim: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_int("num_layers", self.num_layers, minimum=1)
        check_int("page_size", self.page_size, minimum=1)
        check_choice("layout", self.layout, ("NHD", "HND"))
        check_choice("order", self.order, ("layer_first", "page_first"))
        _check_cache_dtype(self.dtype, CACHE_DTYPES + QUANTISED_DTYPES)
        for name, minimum in (("num_kv_heads", 0), ("head_dim", 1), ("value_dim", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            self._check_per_layer(name, value, minimum)
        if not any(layer.num_kv_heads for layer in self.layers):
            raise ValueError(f"num_kv_heads must be positive in at least one layer, got {self.num_kv_heads}.")

    def _check_per_layer(self, name: str, value: object, minimum: int) -> None:
        if isinstance(value, tuple):
            if len(value) != self.num_layers:
                raise ValueError(f"{name} must be one int or {self.num_layers} (num_layers) ints, got {len(value)}.")
            for layer, item in enumerate(value):
                check_int(f"{name} of layer {layer}", item, minimum)
        else:
            check_int(name, value, max(minimum, 1))

    @cached_property
    def layers(self) -> tuple[LayerGeometry, ...]:
        """The geometry of each layer, `num_layers` of them."""

        def per_layer(value: int | tuple[int, ...]) -> tuple[int, ...]:
            return value if isinstance(value, tuple) else (value,) * self.num_layers

        heads, keys = per_layer(self.num_kv_heads), per_layer(self.head_dim)
        values = keys if self.value_dim is None else per_layer(self.value_dim)
        return tuple(map(LayerGeometry, heads, keys, values))

    @property
    def is_uniform(self) -> bool:
        """True when all layers share one geometry and K and V have the same last dim."""
        first = self.layers[0]
        return first.head_dim == first.value_dim and all(layer == first for layer in self.layers)

    @property
    def is_quantized(self) -> bool:
        """True for pages of int8 or float8, whose elements are codes."""
        return self.dtype in QUANTISED_DTYPES

    @property
    def has_scales(self) -> bool:
        """True when each token and head of K and of V has a scale of its own."""
        return self.dtype in SCALED_DTYPES

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers, with their scales."""
        scale_bytes = 8 * sum(layer.num_kv_heads for layer in self.layers) if self.has_scales else 0
        return sum(layer.num_elements for layer in self.layers) * self.dtype.itemsize + scale_bytes

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers; with scales a multiple of 4, which aligns those of the next page."""
        num_bytes = self.bytes_per_token * self.page_size
        return -(-num_bytes // 4) * 4 if self.has_scales else num_bytes

    def num_pages(self, memory_bytes: int) -> int:
        """How many whole pages fit into `memory_bytes`."""
        return _num_pages(memory_bytes, self.bytes_per_page)

    @classmethod
    def from_config(
        cls,
        hf_config: Any,
        tp_size: int = 1,
        *,
        page_size: int = 16,
        dtype: torch.dtype | None = None,
        layout: Layout = "NHD",
        order: Order = "layer_first",
    ) -> KVCacheSpec:
        """Reads the geometry of a Hugging Face config, layer by layer, for one tensor-parallel rank.

        Layers that keep no keys and values (linear attention, convolutions, layers that reuse another layer's cache)
        get 0 heads. With more ranks than KV heads each rank holds one replicated head.
        Raises: ValueError for heads that tp_size cannot split, for MLA models (use MLACacheSpec.from_config), and for a
                layer type whose cache is not keys and values of every token.
        """
        config = _text_config(hf_config)
        if getattr(config, "kv_lora_rank", None):
            raise ValueError("hf_config must keep K and V per head, got an MLA model. Use MLACacheSpec.from_config.")
        num_layers = int(config.num_hidden_layers)
        per_layer = [_layer_config(config, layer) for layer in range(num_layers)]
        storing = _storing_layers(config, num_layers)
        heads = tuple(
            _heads_of_rank(_num_kv_heads(layer), tp_size) if stores else 0
            for layer, stores in zip(per_layer, storing, strict=True)
        )
        keys = tuple(_head_dim(layer) for layer in per_layer)
        values = tuple(_value_dim(layer) for layer in per_layer)
        return cls(
            num_layers=num_layers,
            num_kv_heads=_collapse(heads),
            head_dim=_collapse(keys),
            value_dim=None if values == keys else _collapse(values),
            page_size=page_size,
            dtype=dtype or _config_dtype(config),
            layout=layout,
            order=order,
        )


@dataclass(frozen=True)
class MLACacheSpec:
    """Geometry of a multi-head latent attention cache: one latent and one rope key a token and layer, no heads.

    Units:  page_size counts tokens; byte properties count latent and rope key of all layers together.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.

    >>> MLACacheSpec(num_layers=61, dtype=torch.bfloat16).bytes_per_token
    70272
    """

    num_layers: int
    latent_dim: int = 512
    rope_dim: int = 64
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    order: Order = "layer_first"

    def __post_init__(self) -> None:
        for name in ("num_layers", "latent_dim", "page_size"):
            check_int(name, getattr(self, name), minimum=1)
        check_int("rope_dim", self.rope_dim, 0)
        check_choice("order", self.order, ("layer_first", "page_first"))
        _check_cache_dtype(self.dtype, CACHE_DTYPES)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers."""
        return self.num_layers * (self.latent_dim + self.rope_dim) * self.dtype.itemsize

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers."""
        return self.bytes_per_token * self.page_size

    def num_pages(self, memory_bytes: int) -> int:
        """How many whole pages fit into `memory_bytes`."""
        return _num_pages(memory_bytes, self.bytes_per_page)

    @classmethod
    def from_config(
        cls,
        hf_config: Any,
        *,
        page_size: int = 64,
        dtype: torch.dtype | None = None,
        order: Order = "layer_first",
    ) -> MLACacheSpec:
        """Reads kv_lora_rank and qk_rope_head_dim; every tensor-parallel rank keeps the whole latent."""
        config = _text_config(hf_config)
        if not getattr(config, "kv_lora_rank", None):
            raise ValueError(f"hf_config must have kv_lora_rank, got {type(config).__name__} without. Use KVCacheSpec.")
        return cls(
            num_layers=int(config.num_hidden_layers),
            latent_dim=int(config.kv_lora_rank),
            rope_dim=int(config.qk_rope_head_dim),
            page_size=page_size,
            dtype=dtype or _config_dtype(config),
            order=order,
        )


def calc_kv_cache_memory(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    num_pages: int,
    dtype: torch.dtype = torch.float16,
    *,
    page_size: int = 1,
) -> int:
    """Bytes that K and V of `num_pages` pages take over all layers, for int8 and float8_e4m3fn with their scales.

    >>> calc_kv_cache_memory(32, 8, 128, 8192) == 2**30
    True
    """
    check_int("num_pages", num_pages, 0)
    spec = KVCacheSpec(num_layers, num_kv_heads, head_dim, page_size=page_size, dtype=dtype)
    return num_pages * spec.bytes_per_page


def _num_pages(memory_bytes: int, bytes_per_page: int) -> int:
    check_int("memory_bytes", memory_bytes, 0)
    return memory_bytes // bytes_per_page


def _check_cache_dtype(dtype: object, allowed: tuple[torch.dtype, ...]) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}.")
    if dtype not in allowed:
        raise ValueError(f"dtype must be {' or '.join(map(dtype_name, allowed))}, got {dtype_name(dtype)}.")


def _text_config(hf_config: Any) -> Any:
    get_text_config = getattr(hf_config, "get_text_config", None)
    return get_text_config(decoder=True) if get_text_config is not None else hf_config


def _layer_config(config: Any, layer: int) -> Any:
    per_layer = getattr(config, "per_layer_config", None)
    return config if per_layer is None else per_layer[layer]


def _storing_layers(config: Any, num_layers: int) -> list[bool]:
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    for layer, layer_type in enumerate(layer_types):
        if layer_type not in _STORING_LAYER_TYPES + _STATELESS_LAYER_TYPES:
            known = ", ".join(_STORING_LAYER_TYPES + _STATELESS_LAYER_TYPES)
            raise ValueError(f"layer {layer} of hf_config must be one of {known}, got {layer_type!r}.")
    num_shared = int(getattr(config, "num_kv_shared_layers", None) or 0)
    own_cache = [layer < num_layers - num_shared for layer in range(num_layers)]
    return [own and kind in _STORING_LAYER_TYPES for own, kind in zip(own_cache, layer_types, strict=True)]


def _num_kv_heads(config: Any) -> int:
    # Falcon's and GPT-BigCode's way to say "one KV head", whatever the other fields hold.
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    heads = getattr(config, "num_key_value_heads", None)
    return int(config.num_attention_heads if heads is None else heads)


def _head_dim(config: Any) -> int:
    dim = getattr(config, "head_dim", None)
    return int(dim) if dim else int(config.hidden_size) // int(config.num_attention_heads)


def _value_dim(config: Any) -> int:
    dim = getattr(config, "v_head_dim", None)
    return int(dim) if dim else _head_dim(config)


def _heads_of_rank(num_kv_heads: int, tp_size: int) -> int:
    check_int("tp_size", tp_size, minimum=1)
    if num_kv_heads % tp_size == 0:
        return num_kv_heads // tp_size
    if tp_size % num_kv_heads == 0:
        return 1
    raise ValueError(f"tp_size must divide num_kv_heads = {num_kv_heads} or be a multiple of it, got {tp_size}.")


def _config_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype if dtype in CACHE_DTYPES else torch.float16


def _collapse(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else values
