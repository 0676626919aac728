"""flashinfer.attention: rows of any number a sequence in one call, and attention with sinks."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .arguments import Dtype, Result, Scale, check_pos_encoding_mode, refuse
from .layouts import PagedCache, check_kv_layout, unpack_paged_kv_cache
from .planned import Logits, PlannedBatch, plan_batch
from .prefill import BatchPrefillWithPagedKVCacheWrapper
from .tables import page_table_of_lengths
from .wrapper import check_planned

__all__ = ["BatchAttention", "BatchAttentionWithAttentionSinkWrapper"]


_LARGEST_HEAD_DIM = 256


class BatchAttention:
    """Prefill and decode in one batch over a paged cache: `plan` once a step, `run` once a layer.

    device: where runs take place and index tensors are copied to. The default follows the index tensors where there is
            no such device.
    Raises: KeyError for an unknown layout.
    """

    def __init__(self, kv_layout: str = "NHD", device: str | torch.device = "cuda") -> None:
        self._kv_layout = check_kv_layout(kv_layout)
        self._device: torch.device | None = torch.device(device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            self._device = None
        self._batch: PlannedBatch | None = None

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: Dtype = torch.bfloat16,
        kv_data_type: Dtype = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """Checks the batch of a step and divides its work.

        Shapes: qo_indptr, kv_indptr [B + 1]; kv_indices [>= kv_indptr[-1]]; kv_len_arr [B], the tokens of each
                sequence, which may leave pages at its end unused; int32 or int64, on host or device. Head dims are
                at most 256.
        Raises: ValueError, TypeError for what breaks these lines; NotImplementedError for use_profiler.
        """
        refuse(use_profiler=use_profiler or None)
        for name, head_dim in (("head_dim_qk", head_dim_qk), ("head_dim_vo", head_dim_vo)):
            if head_dim > _LARGEST_HEAD_DIM:
                raise ValueError(f"{name} must be at most {_LARGEST_HEAD_DIM}, got {head_dim}.")
        self._batch = plan_batch(
            qo_indptr,
            page_table_of_lengths(kv_indptr, kv_indices, kv_len_arr, page_size, self._device),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_vo,
            causal=causal,
            logits=Logits(sm_scale=sm_scale, logits_soft_cap=logits_soft_cap),
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            layout=self._kv_layout,
        )

    def run(
        self,
        q: torch.Tensor,
        kv_cache: PagedCache,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: torch.Tensor | None = None,
        kv_cache_sf: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and LSE of one layer, always both.

        Shapes: q [qo_indptr[-1], Hq, D]; kv_cache as `unpack_paged_kv_cache` says; out [T, Hq, Dv]; lse [T, Hq]
                float32, base 2. k_scale multiplies sm_scale, v_scale the output. logits_soft_cap above 0 takes the
                place of the plan's, which must then be above 0, too. profiler_buffer has no effect.
        Owns:   writes out and lse where given, else new tensors.
        Raises: ValueError for dtypes and rows other than the plan's and for shapes; RuntimeError without a plan.
        """
        refuse(kv_cache_sf=kv_cache_sf)
        batch = check_planned(self._batch)
        if logits_soft_cap is not None and logits_soft_cap > 0:
            if not batch.logits.soft_cap:
                raise ValueError(f"logits_soft_cap must be 0, for plan was given none, got {logits_soft_cap}.")
            if logits_soft_cap != batch.logits.soft_cap:
                batch = batch.changed(logits_soft_cap=logits_soft_cap)
        key_pages, value_pages = unpack_paged_kv_cache(kv_cache, self._kv_layout)
        return batch.run_with_lse(q, key_pages, value_pages, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse)


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """Prefill over a paged cache whose heads have a sink: `run(q, paged_kv_cache, sink, sm_scale, ...)`.

    Rule:   a sink [Hq] float32 is a natural logit of its head that joins the denominator alone, and so the LSE;
            sm_scale does not multiply it.
    Buffers: as BatchPrefillWithPagedKVCacheWrapper.
    Taken without effect: use_fp16_qk_reduction, and what `plan` says again and decides: pos_encoding_mode,
            q_data_type, kv_data_type, head_dim_qk, head_dim_vo, window_left.
    Raises: as BatchPrefillWithPagedKVCacheWrapper; KeyError for an unknown position mode.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: Dtype = torch.bfloat16,
        kv_data_type: Dtype = torch.bfloat16,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        check_pos_encoding_mode(pos_encoding_mode)
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            qo_indptr_buf,
            paged_kv_indptr_buf,
            paged_kv_indices_buf,
            paged_kv_last_page_len_buf,
            custom_mask_buf,
            mask_indptr_buf,
            backend,
        )
        self._is_sink_variant = True

    def run(self, q: torch.Tensor, paged_kv_cache: PagedCache, *args: Any, **kwargs: Any) -> Result:
        """Attention of one layer.

        Shapes: sink [Hq] float32 and sm_scale follow the caches by position, or `sinks` is given by name with the
                plan's sm_scale; the rest as BatchPrefillWithPagedKVCacheWrapper.run.
        Raises: TypeError without a sink; what the base raises.
        """
        if not args and kwargs.get("sinks") is None:
            raise TypeError("run must have a sink tensor and sm_scale after the caches, got neither.")
        return super().run(q, paged_kv_cache, *args, **kwargs)

    run_return_lse = functools.partialmethod(run, return_lse=True)
