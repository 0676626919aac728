"""Hugging Face models on a paged cache: packed steps for engines, and a drop-in cache for `model.generate`."""

from __future__ import annotations

from .attention import ATTENTION_NAME, paged_attention_implementation
from .cache import PagedCache
from .errors import UnsupportedModelError
from .geometry import LayerInfo, ModelGeometry, check_model
from .model import PagedModel
from .step import HybridPagedStep, PagedStep
from .tile_step import TileStep

__all__ = [
    "ATTENTION_NAME",
    "HybridPagedStep",
    "LayerInfo",
    "ModelGeometry",
    "PagedCache",
    "PagedModel",
    "PagedStep",
    "TileStep",
    "UnsupportedModelError",
    "check_model",
    "paged_attention_implementation",
]
