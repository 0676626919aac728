"""A transformers model run over pages: packed, without padding, and without changing the model."""

from __future__ import annotations

from typing import Any

import torch

from ...shapes import Shapes, check_dtype
from ...spec import KVCacheSpec
from .adapter import configs_of, using_attention
from .attention import ATTENTION_NAME, CONTEXT_ARGUMENT, PackedStep, paged_call
from .geometry import ModelGeometry, check_model

__all__ = ["PagedModel"]


class PagedModel:
    """Runs packed steps of a causal language model over a paged pool.

    Owns:   nothing of the model; its config names our attention function during `forward` and what it named before
            afterwards, and calls of other users in between run as they always did.
    Raises: UnsupportedModelError when the model's attention needs what pages do not give, TypeError for another object.

    >>> from pagedkv.integrations.transformers import PagedStep
    >>> from pagedkv.testing.tiny_models import tiny_model
    >>> paged = PagedModel(tiny_model("llama"))
    >>> pool = KVPool(paged.spec(page_size=16), num_pages=10)
    >>> table = PageTable.from_rows([[3], [5, 9]], seq_lens=[4, 20], page_size=16)
    >>> step = PagedStep(pool, paged.geometry, table, torch.tensor([0, 4, 24], dtype=torch.int32))
    >>> paged.forward(torch.arange(24), step).shape
    torch.Size([2, 258])
    """

    def __init__(self, model: Any) -> None:
        self.geometry: ModelGeometry = check_model(model)
        self.model = model
        self._configs = configs_of(model)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding: ids must be below it."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def spec(self, page_size: int = 16, dtype: torch.dtype | None = None, **options: Any) -> KVCacheSpec:
        """The cache this model needs; options are those of KVCacheSpec."""
        return self.geometry.spec(page_size, dtype, **options)

    def forward(
        self,
        token_ids: torch.Tensor,
        step: PackedStep,
        *,
        logit_rows: torch.Tensor | None = None,
        **model_arguments: Any,
    ) -> torch.Tensor:
        """Logits of the named packed rows, [R, vocab]; keys and values of all tokens are stored afterwards.

        Shapes: token_ids [T] int64, packed in the order of the step; logit_rows [R] int64, default: the last of each
                sequence.
        When:   runs in inference mode; the model is in eval mode, and no position is beyond its context.
        Raises: ValueError, TypeError for shapes that do not fit the step and for arguments a paged call cannot honour.
        """
        Shapes(T=step.num_tokens).check("token_ids", token_ids, "T")
        check_dtype("token_ids", token_ids, torch.int64)
        rows = step.last_rows() if logit_rows is None else logit_rows
        check_dtype("logit_rows", rows, torch.int64)
        self._check_positions(step)
        if self.model.training:
            raise ValueError("model must be in eval mode, got training mode. Call model.eval() first.")
        with using_attention(self._configs, ATTENTION_NAME), paged_call(), torch.inference_mode():
            output = self.model(
                input_ids=token_ids[None],
                position_ids=step.position_ids[None],
                past_key_values=step,
                use_cache=True,
                logits_to_keep=rows,
                **{CONTEXT_ARGUMENT: step},
                **model_arguments,
            )
        return output.logits[0]  # type: ignore[no-any-return]

    def _check_positions(self, step: PackedStep) -> None:
        limit = self.geometry.max_positions
        if limit is not None and step.num_positions > limit:
            raise ValueError(f"positions must be below {limit} (the model's context), got {step.num_positions - 1}.")
