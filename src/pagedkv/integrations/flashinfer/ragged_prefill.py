"""Prefill over keys and values that are packed one sequence after the other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from .arguments import Dtype, Result, Scale, as_scalar, refuse
from .planned import FLOAT8_DTYPES, Logits, plan_batch
from .prefill_wrapper import PrefillWrapper
from .tables import ragged_pages, ragged_table
from .wrapper import extra_arguments, fill_buffers

__all__ = ["BatchPrefillWithRaggedKVCacheWrapper"]


class BatchPrefillWithRaggedKVCacheWrapper(PrefillWrapper):
    """Prefill over keys and values that are packed one sequence after the other.

    Raises: as BatchPrefillWithPagedKVCacheWrapper.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args, custom_mask_buf, mask_indptr_buf
        )
        self._buffers = {"qo_indptr": qo_indptr_buf, "kv_indptr": kv_indptr_buf}
        self._check_buffers(**{f"{name}_buf": buffer for name, buffer in self._buffers.items()})

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype | None = None,
        o_data_type: Dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: torch.Tensor | None = None,
        o_indptr: torch.Tensor | None = None,
    ) -> None:
        """Checks the batch of a step and divides its work.

        Shapes: qo_indptr, kv_indptr [B + 1] int32 or int64, on host or device; masks as in the paged wrapper.
        Raises: KeyError, ValueError, TypeError for what breaks these lines; NotImplementedError for v_indptr, o_indptr,
                prefix_len_ptr and what belongs to it.
        """
        refuse(
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            max_item_len_ptr=max_item_len_ptr,
            v_indptr=v_indptr,
            o_indptr=o_indptr,
        )
        batch = plan_batch(
            qo_indptr,
            ragged_table(kv_indptr, self.device),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_vo,
            causal=causal,
            window_left=window_left,
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            logits=Logits(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta),
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            o_data_type=o_data_type,
        )
        if o_data_type is None and batch.q_dtype in FLOAT8_DTYPES:
            batch = dataclasses.replace(batch, out_dtype=torch.bfloat16)
        self._check_mask_buffers(batch)
        if self._use_cuda_graph:
            fill_buffers(self._buffers, {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr})
        self._batch = batch

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        o_scale: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
    ) -> Result:
        """Attention of one layer.

        Shapes: q [qo_indptr[-1], Hq, D]; k [L, Hk, D], v [L, Hk, Dv] with L = kv_indptr[-1] ("HND": [Hk, L, D]); out
                [T, Hq, Dv]; lse [T, Hq] float32, base 2. v_scale * o_scale multiply the output.
        Raises: ValueError for dtypes other than the plan's and for shapes.
        """
        refuse(kv_cache_sf=kv_cache_sf)
        batch = self.batch
        options = extra_arguments(args, self._is_sink_variant, q, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
        if o_scale is not None:
            factor, values = as_scalar("o_scale", o_scale), options.get("v_scale")
            options["v_scale"] = factor if values is None else values * factor
        return batch.run(
            q,
            *(ragged_pages(name, packed, batch.plan, self._kv_layout) for name, packed in (("k", k), ("v", v))),
            **options,
            layout="NHD",
            out=out,
            lse=lse,
            return_lse=return_lse,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        return_lse: bool = False,
    ) -> Result:
        """The older `run`: its options, defaults included, take the place of the plan's from here on."""
        batch = self.batch.changed(
            causal=causal,
            window_left=window_left,
            pos_encoding_mode=pos_encoding_mode,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self._run_changed(batch, lambda: self.run(q, k, v, return_lse=return_lse))

    forward_return_lse = functools.partialmethod(forward, return_lse=True)
