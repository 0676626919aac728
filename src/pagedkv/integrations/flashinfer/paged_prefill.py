"""Prefill and append over a paged cache."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .arguments import Dtype, Result, Scale, refuse
from .layouts import PagedCache, unpack_paged_kv_cache
from .planned import Logits, plan_batch
from .prefill_wrapper import PrefillWrapper
from .tables import page_table
from .utils import log2e
from .wrapper import check_window, extra_arguments, fill_buffers

__all__ = ["BatchPrefillWithPagedKVCacheWrapper"]


class BatchPrefillWithPagedKVCacheWrapper(PrefillWrapper):
    """Prefill and append over a paged cache: `plan` once a step, `run` once a layer.

    Buffers: with use_cuda_graph the three index buffers and qo_indptr_buf fix the batch size and are kept filled.
    Raises:  KeyError for an unknown layout; ValueError for an unaligned workspace, a missing buffer, an unknown back
             end; NotImplementedError for jit_args other than attention sinks.
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
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args, custom_mask_buf, mask_indptr_buf
        )
        self._buffers = {
            "qo_indptr": qo_indptr_buf,
            "paged_kv_indptr": paged_kv_indptr_buf,
            "paged_kv_indices": paged_kv_indices_buf,
            "paged_kv_last_page_len": paged_kv_last_page_len_buf,
        }
        self._check_buffers(**{f"{name}_buf": buffer for name, buffer in self._buffers.items()})

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
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
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Checks the batch of a step and divides its work.

        Shapes: qo_indptr, paged_kv_indptr [B + 1]; paged_kv_indices [>= paged_kv_indptr[-1]]; paged_kv_last_page_len
                [B], 1..page_size; int32 or int64, on host or device. custom_mask bool, every sequence's
                [qo_len, kv_len] row-major, one after the other, True = keep, in place of causal; or
                packed_custom_mask uint8, the lowest bit first, each sequence from a byte of its own on.
        Taken without effect: use_fp16_qk_reduction (accumulation is float32), non_blocking, fixed_split_size and
                disable_split_kv (results never depend on the batch), and what says again what the arrays say:
                seq_lens, seq_lens_q, block_tables, max_token_per_sequence, max_sequence_kv.
        Raises: KeyError, ValueError, TypeError for what breaks these lines; NotImplementedError for prefix_len_ptr and
                what belongs to it.
        """
        refuse(
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            max_item_len_ptr=max_item_len_ptr,
        )
        table = page_table(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, self.device)
        batch = plan_batch(
            qo_indptr,
            table,
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
            layout=self._kv_layout,
        )
        self._check_mask_buffers(batch)
        if self._use_cuda_graph:
            given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
            fill_buffers(self._buffers, dict(zip(self._buffers, given, strict=True)), "paged_kv_indices")
        self._batch = batch

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
        lse_base: str = "log2",
        lse_layout: str = "NH",
    ) -> Result:
        """Attention of one layer.

        Shapes: q [qo_indptr[-1], Hq, D]; paged_kv_cache as `unpack_paged_kv_cache` says; out [T, Hq, Dv]; lse [T, Hq]
                float32, base 2 (lse_base "ln": natural; lse_layout "HN": a view [Hq, T]); sinks [Hq] float32.
        Owns:   writes out and lse where given, else new tensors.
        Raises: ValueError for dtypes other than the plan's and for shapes; AssertionError for another window_left.
        """
        refuse(kv_cache_sf=kv_cache_sf, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        batch = self.batch
        check_window(window_left, batch)
        _check_lse_form(lse_base, lse_layout)
        named = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "sinks": sinks}
        options = extra_arguments(args, self._is_sink_variant, q, **named)
        key_pages, value_pages = unpack_paged_kv_cache(paged_kv_cache, self._kv_layout)
        result = batch.run(
            q,
            key_pages,
            value_pages,
            **options,
            out=out,
            lse=lse,
            return_lse=return_lse or lse is not None,
        )
        if not isinstance(result, tuple):
            return result
        # In place: the buffer, where one was given, holds it in this base too.
        sums = result[1].div_(log2e) if lse_base == "ln" else result[1]
        if not return_lse:
            return result[0]
        return result[0], sums.T if lse_layout == "HN" else sums

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
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
        scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
        return self._run_changed(batch, lambda: self.run(q, paged_kv_cache, **scales, return_lse=return_lse))

    forward_return_lse = functools.partialmethod(forward, return_lse=True)


def _check_lse_form(base: str, layout: str) -> None:
    if base not in ("log2", "ln") or layout not in ("NH", "HN"):
        raise ValueError(f"lse_base must be log2 or ln and lse_layout NH or HN, got {base!r} and {layout!r}.")
