"""flashinfer.pod: prefill and decode of one step in one call. Two attentions that do not depend on each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from .arguments import Dtype, Result, Scale, check_pos_encoding_mode, refuse
from .layouts import PagedCache, check_kv_layout, unpack_paged_kv_cache
from .planned import Logits, PlannedBatch, plan_batch
from .single import attend_single
from .tables import page_table, row_indptr
from .wrapper import PlannedWrapper, check_planned, fill_buffers

__all__ = ["BatchPODWithPagedKVCacheWrapper", "PODWithPagedKVCacheWrapper"]


class PODWithPagedKVCacheWrapper(PlannedWrapper):
    """One prefill with contiguous keys beside a batch of decodes: `plan` once a step, `run` once a layer.

    Buffers: with use_cuda_graph the three index buffers fix the number of decodes and are kept filled.
    Raises:  KeyError for an unknown layout; ValueError for an unaligned workspace, a missing buffer;
             NotImplementedError for jit_args.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        jit_args: list[Any] | None = None,
    ) -> None:
        refuse(jit_args=jit_args)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._plan_decode: Callable[..., PlannedBatch] | None = None
        self._buffers = {
            "indptr": paged_kv_indptr_buffer,
            "indices": paged_kv_indices_buffer,
            "last_page_len": paged_kv_last_page_len_buffer,
        }
        self._check_buffers(**{f"paged_kv_{name}_buffer": buffer for name, buffer in self._buffers.items()})

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: Dtype | None = "float16",
        kv_data_type: Dtype | None = None,
        data_type: Dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        """Checks the decodes of a step and divides their work; options are those of the decodes alone.

        Shapes: indptr [B + 1]; indices [>= indptr[-1]]; last_page_len [B], 1..page_size; int32 or int64, on host or
                device.
        Options: data_type is the older name of kv_data_type, and of q_data_type where that is None.
        Raises: KeyError, ValueError, TypeError for what breaks these lines.
        """
        table = page_table(indptr, indices, last_page_len, page_size, self.device)
        plan_decode = functools.partial(
            plan_batch,
            row_indptr(table.num_seqs, 1, table.indptr.device),
            table,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            window_left=window_left,
            logits=Logits(pos_encoding_mode, sm_scale, None, rope_scale, rope_theta),
            q_data_type=q_data_type or data_type or "float16",
            kv_data_type=kv_data_type or data_type,
            layout=self._kv_layout,
        )
        batch = plan_decode()
        if self._use_cuda_graph:
            given = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
            fill_buffers(self._buffers, given, "indices")
        self._batch, self._plan_decode = batch, plan_decode

    begin_forward = plan

    def run(
        self,
        q_p: torch.Tensor,
        k_p: torch.Tensor,
        v_p: torch.Tensor,
        q_d: torch.Tensor,
        paged_kv_cache_d: PagedCache,
        custom_mask_p: torch.Tensor | None = None,
        packed_custom_mask_p: torch.Tensor | None = None,
        causal_p: bool = False,
        kv_layout_p: str = "NHD",
        pos_encoding_mode_p: str = "NONE",
        sm_scale_p: float | None = None,
        window_left_p: int = -1,
        rope_scale_p: float | None = None,
        rope_theta_p: float | None = None,
        return_lse_p: bool = False,
        custom_mask_d: torch.Tensor | None = None,
        packed_custom_mask_d: torch.Tensor | None = None,
        causal_d: bool = False,
        kv_layout_d: str = "NHD",
        pos_encoding_mode_d: str = "NONE",
        sm_scale_d: float | None = None,
        window_left_d: int = -1,
        rope_scale_d: float | None = None,
        rope_theta_d: float | None = None,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
        *args: Any,
    ) -> tuple[Result, Result]:
        """Attention of one layer: (prefill, decode), each a result, or (result, lse) where its return_lse asks for it.

        Shapes: q_p [Tq, Hq, D]; k_p, v_p [L, Hk, D] ("HND": [Hk, L, D]); custom_mask_p [Tq, L] bool in place of
                causal_p, or packed_custom_mask_p, as in single_prefill_with_kv_cache; q_d [B, Hq, D]; paged_kv_cache_d
                as `unpack_paged_kv_cache` says; custom_mask_d bool, every sequence's [kv_len], one after the other, or
                packed_custom_mask_d, each sequence from a byte of its own on; results like q_p and q_d; lse [rows, Hq]
                float32, base 2.
        Options: those of the decodes that say other than their defaults take the place of what `plan` was told, for
                this call; kv_layout_d "NHD" stands for the wrapper's. causal_d says nothing of one row a sequence.
                q_scale, k_scale and v_scale are those of the decodes.
        Raises: RuntimeError without a plan; ValueError for dtypes other than the plan's and for shapes; KeyError for an
                unknown layout or position mode; TypeError for arguments of kernels of one's own.
        """
        if args:
            raise TypeError(f"run must have no positional arguments after enable_pdl, got {len(args)}.")
        check_kv_layout(kv_layout_d)
        changes: dict[str, Any] = {
            "pos_encoding_mode": None
            if check_pos_encoding_mode(pos_encoding_mode_d) == "NONE"
            else pos_encoding_mode_d,
            "sm_scale": sm_scale_d,
            "window_left": window_left_d if window_left_d >= 0 else None,
            "rope_scale": rope_scale_d,
            "rope_theta": rope_theta_d,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        batch = self.batch
        if custom_mask_d is not None or packed_custom_mask_d is not None:
            assert self._plan_decode is not None  # set with the batch
            batch = self._plan_decode(custom_mask=custom_mask_d, packed_custom_mask=packed_custom_mask_d)
        if changes:
            batch = batch.changed(**changes)
        layout = self._kv_layout if kv_layout_d == "NHD" else kv_layout_d
        key_pages, value_pages = unpack_paged_kv_cache(paged_kv_cache_d, layout)
        decode = batch.run(
            q_d,
            key_pages,
            value_pages,
            layout=layout,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            return_lse=return_lse_d,
        )
        prefill = attend_single(
            q_p,
            k_p,
            v_p,
            Logits(pos_encoding_mode_p, sm_scale_p, None, rope_scale_p, rope_theta_p),
            kv_layout=kv_layout_p,
            causal=causal_p,
            window_left=window_left_p,
            custom_mask=custom_mask_p,
            packed_custom_mask=packed_custom_mask_p,
            return_lse=return_lse_p,
        )
        return prefill, decode


class BatchPODWithPagedKVCacheWrapper(PlannedWrapper):
    """A batch of prefills beside a batch of decodes, both paged: `plan` once a step, `run` once a layer.

    Raises: KeyError for an unknown layout; ValueError for an unaligned workspace.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor | None, kv_layout: str = "NHD") -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        self._plan_prefill: Callable[..., PlannedBatch] | None = None
        self._prefill: PlannedBatch | None = None

    def plan(
        self,
        qo_indptr_p: torch.Tensor,
        kv_indptr_p: torch.Tensor,
        kv_indices_p: torch.Tensor,
        last_page_len_p: torch.Tensor,
        qo_indptr_d: torch.Tensor,
        kv_indptr_d: torch.Tensor,
        kv_indices_d: torch.Tensor,
        last_page_len_d: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: Dtype | None = "float16",
        kv_data_type: Dtype | None = None,
        data_type: Dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        """Checks both batches of a step and divides their work; options are those of both.

        Shapes: qo_indptr, kv_indptr [B + 1]; kv_indices [>= kv_indptr[-1]]; last_page_len [B], 1..page_size, of the
                prefills (_p) and of the decodes (_d); int32 or int64, on host or device.
        Options: data_type is the older name of kv_data_type, and of q_data_type where that is None.
        Raises: KeyError, ValueError, TypeError for what breaks these lines. The plan before then stays.
        """
        plan_prefill, plan_decode = (
            functools.partial(
                plan_batch,
                qo_indptr,
                page_table(*table, page_size, self.device),
                num_qo_heads=num_qo_heads,
                num_kv_heads=num_kv_heads,
                head_dim_qk=head_dim,
                window_left=window_left,
                logits=Logits(pos_encoding_mode, sm_scale, None, rope_scale, rope_theta),
                q_data_type=q_data_type or data_type or "float16",
                kv_data_type=kv_data_type or data_type,
                layout=self._kv_layout,
            )
            # A copy: prefills are planned again where `run` asks for another mask.
            for qo_indptr, table in (
                (qo_indptr_p.clone(), (kv_indptr_p, kv_indices_p, last_page_len_p)),
                (qo_indptr_d, (kv_indptr_d, kv_indices_d, last_page_len_d)),
            )
        )
        prefill, decode = plan_prefill(causal=True), plan_decode()
        self._prefill, self._batch, self._plan_prefill = prefill, decode, plan_prefill

    begin_forward = plan

    def run(
        self,
        q_p: torch.Tensor,
        paged_kv_cache_p: PagedCache,
        q_d: torch.Tensor,
        paged_kv_cache_d: PagedCache,
        custom_mask_p: torch.Tensor | None = None,
        packed_custom_mask_p: torch.Tensor | None = None,
        causal_p: bool = False,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        return_lse: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
    ) -> (
        tuple[torch.Tensor, torch.Tensor] | tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    ):
        """Attention of one layer: (out_p, out_d), or with return_lse ((out_p, out_d), (lse_p, lse_d)).

        Shapes: q_p [qo_indptr_p[-1], Hq, D]; q_d [qo_indptr_d[-1], Hq, D]; both caches as `unpack_paged_kv_cache` says;
                masks as in BatchPrefillWithPagedKVCacheWrapper.plan, in place of causal_p; out like q; lse [rows, Hq]
                float32, base 2.
        Rule:   decodes see all keys of their sequence, within the plan's window. q_scale, k_scale and v_scale are those
                of the decodes.
        Raises: RuntimeError without a plan; ValueError for dtypes and rows other than the plan's and for shapes.
        """
        decode, prefill = self.batch, check_planned(self._prefill)
        assert self._plan_prefill is not None  # set with the batch
        if custom_mask_p is not None or packed_custom_mask_p is not None:
            prefill = self._plan_prefill(custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p)
        elif prefill.plan.causal != bool(causal_p):
            # Kept: the layers of a step ask for the same.
            prefill = self._prefill = self._plan_prefill(causal=causal_p)
        caches = [unpack_paged_kv_cache(cache, self._kv_layout) for cache in (paged_kv_cache_p, paged_kv_cache_d)]
        scales: dict[str, Any] = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        if not return_lse:
            outputs = prefill.run(q_p, *caches[0]), decode.run(q_d, *caches[1], **scales)
            return cast(tuple[torch.Tensor, torch.Tensor], outputs)
        out_p, lse_p = prefill.run_with_lse(q_p, *caches[0])
        out_d, lse_d = decode.run_with_lse(q_d, *caches[1], **scales)
        return (out_p, out_d), (lse_p, lse_d)
