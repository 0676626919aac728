"""The configuration of a model, without its weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from ..integrations.transformers.checkpoint import local_checkpoint
from .quiet import quiet_transformers

__all__ = ["load_config"]


def load_config(name_or_dir: str) -> Any:
    """The Hugging Face config of a directory, a .gguf file or a hub id. Raises ValueError when there is none."""
    with quiet_transformers():
        source, name = local_checkpoint(name_or_dir)
        try:
            return AutoConfig.from_pretrained(source)
        except OSError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"model must have a config that can be read, got {name!r}: {reason}") from error
