"""What a model's attention layers are, found out by asking the config and watching one forward pass of two tokens."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...shapes import dtype_name
from ...spec import CACHE_DTYPES, KVCacheSpec
from .adapter import PreTrainedModel, configs_of, layer_types, text_config, uses_attention_interface, using_attention
from .attention import ATTENTION_NAME, CONTEXT_ARGUMENT, AttentionCall, paged_call
from .errors import UnsupportedModelError

__all__ = ["LayerInfo", "ModelGeometry", "check_model"]

_KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "dummy"})


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer.

    stored_in: the layer whose keys and values it reads: its own, or an earlier one's.
    has_sinks: whether its softmax counts learned logits beside those of the keys.
    """

    stored_in: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    has_sinks: bool


@dataclass(frozen=True)
class ModelGeometry:
    """The attention layers of a model by layer index, and how many tokens its positions allow (None: not known)."""

    layers: dict[int, LayerInfo]
    max_positions: int | None
    dtype: torch.dtype

    @property
    def windows(self) -> list[int | None]:
        """How many tokens are seen of the keys that each layer stores, by the layer that sees most; None for all."""
        windows: list[int | None] = [1] * (max(self.layers) + 1)
        for layer in self.layers.values():
            seen = windows[layer.stored_in]
            windows[layer.stored_in] = None if seen is None or layer.window is None else max(seen, layer.window)
        return windows

    def spec(self, page_size: int = 16, dtype: torch.dtype | None = None, **options: Any) -> KVCacheSpec:
        """The cache the model needs: pages of all storing layers, in the model's dtype when none is given."""
        num_layers = max(self.layers) + 1
        heads, keys, values = [0] * num_layers, [1] * num_layers, [1] * num_layers
        for index, layer in self.layers.items():
            if layer.stored_in == index:
                heads[index], keys[index], values[index] = layer.num_kv_heads, layer.head_dim, layer.value_dim
        if len({*zip(heads, keys, values, strict=True)}) == 1:
            value_dim = None if values[0] == keys[0] else values[0]
            return KVCacheSpec(
                num_layers, heads[0], keys[0], page_size, dtype or self.dtype, value_dim=value_dim, **options
            )
        return KVCacheSpec(
            num_layers,
            tuple(heads),
            tuple(keys),
            page_size,
            dtype or self.dtype,
            value_dim=None if values == keys else tuple(values),
            **options,
        )


def check_model(model: Any) -> ModelGeometry:
    """Refuses a model that packed, paged calls would run wrongly; describes the layers of one that they run.

    When:   before anything is allocated or written; runs the model once, over two tokens, without a cache.
    Raises: UnsupportedModelError naming what the model's attention needs and pages do not give; TypeError for what is
            not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}.")
    name = type(model).__name__
    types, windows = _check_config(name, model)
    probe = _Probe(name)
    were_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        _run_probe(model, probe)
    finally:
        for module in were_training:
            module.training = True
    return ModelGeometry(_layers(name, probe, types, windows), _max_positions(model), _model_dtype(model))


def _check_config(name: str, model: Any) -> tuple[list[str], list[int | None]]:
    config = text_config(model.config)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} needs cross attention (encoder and decoder), which has no pages.")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{name} needs multi-head latent attention (kv_lora_rank), got pages of K and V.")
    if not uses_attention_interface(model):
        raise UnsupportedModelError(f"{name} must call its attention through transformers' AttentionInterface.")
    parameters = inspect.signature(model.forward).parameters
    missing = [p for p in ("past_key_values", "position_ids", "logits_to_keep") if p not in parameters]
    if missing:
        raise UnsupportedModelError(f"{name}.forward must take {' and '.join(missing)}; is it a causal language model?")
    types, windows = layer_types(model.config)
    unknown = sorted(set(types) - _KNOWN_LAYER_TYPES)
    if unknown:
        raise UnsupportedModelError(
            f"{name} needs layers of type {', '.join(unknown)}, which keep no pages of K and V."
        )
    explicit = getattr(config, "layer_types", None) is not None
    return types, windows if explicit else [None] * len(types)


class _Probe:
    """Stands in for cache and attention during one forward pass, and writes down what was asked of both."""

    is_compileable = False
    is_sliding = is_linear = is_dummy = ()

    def __init__(self, model_name: str) -> None:
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.layers: dict[int, LayerInfo] = {}
        self._model_name = model_name

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.stored[layer_idx] = key, value
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def attend(self, call: AttentionCall) -> torch.Tensor:
        # Layers that share a cache hand on the very tensors that update() returned, and so say whose they are.
        owner = next((i for i, (key, value) in self.stored.items() if key is call.key and value is call.value), None)
        if owner is None:
            raise UnsupportedModelError(
                f"{self._model_name} attends over other keys and values than it caches in layer {call.layer_idx}."
            )
        if call.query.dtype not in CACHE_DTYPES:
            raise UnsupportedModelError(
                f"{self._model_name} computes attention in {dtype_name(call.query.dtype)}, which no back end does."
            )
        _, num_q_heads, num_tokens, head_dim = call.query.shape
        num_kv_heads, value_dim = call.value.shape[1], call.value.shape[3]
        arguments = call.arguments
        dims = num_q_heads, num_kv_heads, head_dim, value_dim
        self.layers[call.layer_idx] = LayerInfo(owner, *dims, arguments.window, arguments.sinks is not None)
        return call.query.new_zeros(1, num_tokens, num_q_heads, value_dim)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedModelError(
            f"{self._model_name} needs {name!r} of its cache, which pages of K and V do not have."
        )


def _run_probe(model: Any, probe: _Probe) -> None:
    device = model.get_input_embeddings().weight.device
    arguments = {
        "input_ids": torch.zeros(1, 2, dtype=torch.int64, device=device),
        "position_ids": torch.arange(2, dtype=torch.int64, device=device)[None],
        "past_key_values": probe,
        "use_cache": True,
        "logits_to_keep": torch.tensor([1], dtype=torch.int64, device=device),
        CONTEXT_ARGUMENT: probe,
    }
    with using_attention(configs_of(model), ATTENTION_NAME), paged_call(), torch.inference_mode():
        try:
            model(**arguments)
        except UnsupportedModelError:
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UnsupportedModelError(f"{type(model).__name__} cannot make a paged call: {error}") from error


def _layers(name: str, probe: _Probe, types: list[str], windows: list[int | None]) -> dict[int, LayerInfo]:
    if not probe.layers:
        raise UnsupportedModelError(f"{name} did not hand its paged context to any attention layer.")
    for layer in sorted(set(probe.stored) - {info.stored_in for info in probe.layers.values()}):
        raise UnsupportedModelError(f"{name} caches keys in layer {layer} and attends over them by other means.")
    layers = {}
    for index, info in sorted(probe.layers.items()):
        is_sliding = index < len(types) and types[index] == "sliding_attention"
        window = info.window
        if window is None and is_sliding:
            # The window came through the mask alone; a config that spells its layers out still says how wide it is.
            window = windows[index]
            if window is None:
                raise UnsupportedModelError(f"{name} keeps the sliding window of layer {index} in its mask alone.")
        layers[index] = replace(info, window=window)
    return layers


def _max_positions(model: Any) -> int | None:
    config = text_config(model.config)
    limits = [getattr(config, "max_position_embeddings", None)]
    # longrope turns all positions of a forward pass by other frequencies once one of them passes this length: in a
    # packed step, by those of the longest sequence. Below it every sequence is turned as it is alone.
    limits += [rope.get("original_max_position_embeddings") for rope in _ropes(config) if _is_longrope(rope)]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=None)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rope parameters of the model, or of each layer type where they differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _is_longrope(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type") == "longrope"


def _model_dtype(model: Any) -> torch.dtype:
    dtype = model.dtype
    return dtype if dtype in CACHE_DTYPES else torch.float32
