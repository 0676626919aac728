"""What both batch wrappers of prefill have."""

from __future__ import annotations

from typing import Any

import torch

from .arguments import check_backend
from .planned import PlannedBatch
from .wrapper import PlannedWrapper, takes_sinks

__all__ = ["PrefillWrapper"]


class PrefillWrapper(PlannedWrapper):
    """What both batch wrappers of prefill have: buffers for a mask in graph mode, and the forms of forward."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None,
        kv_layout: str,
        use_cuda_graph: bool,
        backend: str,
        jit_args: list[Any] | None,
        custom_mask_buf: torch.Tensor | None,
        mask_indptr_buf: torch.Tensor | None,
    ) -> None:
        check_backend(backend)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._is_sink_variant = takes_sinks(jit_args)
        if use_cuda_graph and custom_mask_buf is not None:
            self._check_buffers(mask_indptr_buf=mask_indptr_buf)
        self._custom_mask_buf, self._mask_indptr_buf = custom_mask_buf, mask_indptr_buf

    def _check_mask_buffers(self, batch: PlannedBatch) -> None:
        """Graph mode promises that a mask fits its buffers; ours stays with the plan."""
        if not self._use_cuda_graph or batch.plan.custom_mask is None:
            return
        if self._custom_mask_buf is None:
            raise ValueError(
                "custom_mask_buf must be given to the wrapper to plan a mask in CUDA graph mode, got None."
            )
        if batch.plan.custom_mask.numel() > self._custom_mask_buf.numel() * 8:
            raise ValueError(
                f"the mask must have at most the {self._custom_mask_buf.numel() * 8} bits of custom_mask_buf, got "
                f"{batch.plan.custom_mask.numel()}."
            )
