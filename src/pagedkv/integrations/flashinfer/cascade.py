"""flashinfer.cascade: attention over keys in levels, what sequences share first and what each has alone last."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from ...shapes import Shapes, check_int
from .arguments import Dtype, int32_indices
from .layouts import PagedCache, unpack_paged_kv_cache
from .paged_prefill import BatchPrefillWithPagedKVCacheWrapper
from .planned import Logits, PlannedBatch, plan_batch, rounded
from .single import attend_single
from .states import merge_state, merge_state_in_place, merge_states
from .tables import page_table, row_indptr
from .wrapper import PlannedWrapper, fill_buffers

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]


class MultiLevelCascadeAttentionWrapper:
    """Attention over one paged cache read through a page table a level: `plan` once a step, `run` once a layer.

    Buffers: with use_cuda_graph the four lists hold one buffer a level each, which fix the batch sizes and are kept
             filled.
    Rule:    causal is that of the last level alone; every row sees all keys of the levels above. Everything else that
             follows positions (window, rotation, ALiBi) is applied level by level, as FlashInfer does it: positions
             begin at 0 at each level's own first key, so over several levels it is not that of the joined sequence.
    Raises:  KeyError for an unknown layout; ValueError for an unaligned workspace, num_levels below 1, buffers that
             are missing.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor | None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indices_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: list[torch.Tensor] | None = None,
    ) -> None:
        check_int("num_levels", num_levels, minimum=1)
        buffers = {
            "qo_indptr_buf_arr": qo_indptr_buf_arr,
            "paged_kv_indptr_buf_arr": paged_kv_indptr_buf_arr,
            "paged_kv_indices_buf_arr": paged_kv_indices_buf_arr,
            "paged_kv_last_page_len_buf_arr": paged_kv_last_page_len_buf_arr,
        }
        if use_cuda_graph:
            for name, arrays in buffers.items():
                _check_levels(name, arrays, num_levels)
        self._use_cuda_graph = use_cuda_graph
        self._levels = []
        for level in range(num_levels):
            of_level = [arrays[level] if use_cuda_graph and arrays is not None else None for arrays in buffers.values()]
            self._levels.append(
                BatchPrefillWithPagedKVCacheWrapper(
                    float_workspace_buffer,
                    kv_layout,
                    use_cuda_graph,
                    qo_indptr_buf=of_level[0],
                    paged_kv_indptr_buf=of_level[1],
                    paged_kv_indices_buf=of_level[2],
                    paged_kv_last_page_len_buf=of_level[3],
                )
            )

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether sizes are fixed by buffers that were given when the wrapper was made."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffers: list[torch.Tensor]
    ) -> None:
        """Takes other workspaces, one of int a level, checked alike; plans stay valid."""
        _check_levels("int_workspace_buffers", int_workspace_buffers, len(self._levels))
        for level, buffer in zip(self._levels, int_workspace_buffers, strict=True):
            level.reset_workspace_buffer(float_workspace_buffer, buffer)

    def plan(
        self,
        qo_indptr_arr: list[torch.Tensor],
        paged_kv_indptr_arr: list[torch.Tensor],
        paged_kv_indices_arr: list[torch.Tensor],
        paged_kv_last_page_len: list[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
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
    ) -> None:
        """Checks the batch of a step and divides the work of every level.

        Shapes: lists of one tensor a level, level 0 first, each as in BatchPrefillWithPagedKVCacheWrapper. All levels
                are over the same rows in the same order: a level that all share has qo_indptr [0, T].
        Raises: ValueError for lists of another length, and where the levels do not have the same number of rows;
                KeyError, ValueError, TypeError for what breaks a level. The plan before then stays.
        """
        arrays = {
            "qo_indptr_arr": qo_indptr_arr,
            "paged_kv_indptr_arr": paged_kv_indptr_arr,
            "paged_kv_indices_arr": paged_kv_indices_arr,
            "paged_kv_last_page_len": paged_kv_last_page_len,
        }
        for name, tensors in arrays.items():
            _check_levels(name, tensors, len(self._levels))
        num_rows = [int(int32_indices("qo_indptr_arr", indptr)[-1]) for indptr in qo_indptr_arr]
        if len(set(num_rows)) > 1:
            raise ValueError(f"qo_indptr_arr must end with the same number of rows at every level, got {num_rows}.")
        levels = [copy.copy(level) for level in self._levels]
        # No buffer of graph mode is written before every level is planned and fits its own.
        for level in levels:
            level._use_cuda_graph = False
        for number, level in enumerate(levels):
            level.plan(
                qo_indptr_arr[number],
                paged_kv_indptr_arr[number],
                paged_kv_indices_arr[number],
                paged_kv_last_page_len[number],
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
                causal=causal and number == len(levels) - 1,
                pos_encoding_mode=pos_encoding_mode,
                use_fp16_qk_reduction=use_fp16_qk_reduction,
                sm_scale=sm_scale,
                window_left=window_left,
                logits_soft_cap=logits_soft_cap,
                rope_scale=rope_scale,
                rope_theta=rope_theta,
                q_data_type=q_data_type,
                kv_data_type=kv_data_type,
                o_data_type=torch.float32,
            )
        for check_only in (True, False) if self._use_cuda_graph else ():
            for level, *given in zip(levels, *arrays.values(), strict=True):
                named = dict(zip(level._buffers, given, strict=True))
                fill_buffers(level._buffers, named, "paged_kv_indices", check_only=check_only)
        for level in levels:
            level._use_cuda_graph = self._use_cuda_graph
        self._levels = levels

    begin_forward = plan

    def run(self, q: torch.Tensor, paged_kv_cache: PagedCache) -> torch.Tensor:
        """Attention of one layer over the keys of all levels, merged in float32 and rounded once.

        Shapes: q [T, Hq, D]; paged_kv_cache as `unpack_paged_kv_cache` says; the result [T, Hq, D] in the dtype of q.
        Raises: RuntimeError without a plan; ValueError for dtypes and rows other than the plan's and for shapes.
        """
        plan = self._levels[0].batch.plan
        shape = (len(self._levels), plan.num_tokens, plan.num_q_heads)
        values = torch.empty((*shape, plan.value_dim), dtype=torch.float32, device=q.device)
        lses = torch.empty(shape, dtype=torch.float32, device=q.device)
        for level, out, lse in zip(self._levels, values, lses, strict=True):
            level.run(q, paged_kv_cache, out=out, lse=lse, return_lse=True)
        return rounded(merge_states(values.transpose(0, 1), lses.transpose(0, 1))[0], q.dtype)

    forward = run

    def end_forward(self) -> None:
        """Does nothing; kept for callers that pair it with begin_forward."""


class _SharedPrefixWrapper(PlannedWrapper):
    """What both wrappers of one shared prefix have: packed keys of the prefix, pages of what each sequence has alone.

    Raises: KeyError for an unknown layout; ValueError for an unaligned workspace.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor | None, kv_layout: str = "NHD") -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def _attend(
        self,
        batch: PlannedBatch,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: PagedCache,
        sm_scale: float | None,
    ) -> torch.Tensor:
        plan = batch.plan
        key_pages, value_pages = unpack_paged_kv_cache(unique_kv_cache, self._kv_layout)
        shapes = Shapes(T=plan.num_tokens, Hq=plan.num_q_heads, Hk=plan.num_kv_heads, D=plan.head_dim)
        shapes.check("q", q, "T Hq D")
        for name, packed in (("k_shared", k_shared), ("v_shared", v_shared)):
            shapes.check(name, packed, "Lshared Hk D" if self._kv_layout == "NHD" else "Hk Lshared D")
        batch = replace(batch, q_dtype=q.dtype, out_dtype=torch.float32)
        alone = batch.run(q, key_pages, value_pages, sm_scale=sm_scale, return_lse=True)
        shared = attend_single(
            q,
            k_shared,
            v_shared,
            Logits(sm_scale=sm_scale),
            kv_layout=self._kv_layout,
            o_dtype=torch.float32,
            return_lse=True,
        )
        return rounded(merge_state(*shared, *alone)[0], q.dtype)


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper(_SharedPrefixWrapper):
    """Decode where all sequences begin with one prefix: `begin_forward` once a step, `forward` once a layer."""

    def plan(
        self,
        unique_kv_indptr: torch.Tensor,
        unique_kv_indices: torch.Tensor,
        unique_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: Dtype = "float16",
    ) -> None:
        """Checks the pages that each sequence has alone and divides their work.

        Shapes: unique_kv_indptr [B + 1]; unique_kv_indices [>= unique_kv_indptr[-1]]; unique_kv_last_page_len [B],
                1..page_size; int32 or int64, on host or device. A sequence may have no page of its own.
        Options: data_type of the cache; that of q is taken from q.
        Raises: ValueError, TypeError for what breaks these lines.
        """
        table = page_table(unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len, page_size, self.device)
        self._batch = plan_batch(
            row_indptr(table.num_seqs, 1, table.indptr.device),
            table,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            kv_data_type=data_type,
            layout=self._kv_layout,
        )

    begin_forward = plan

    def forward(
        self, q: torch.Tensor, k_shared: torch.Tensor, v_shared: torch.Tensor, unique_kv_cache: PagedCache
    ) -> torch.Tensor:
        """Attention of one layer; both parts are merged in float32 and rounded once.

        Shapes: q [B, Hq, D]; k_shared, v_shared [Lshared, Hk, D] ("HND": [Hk, Lshared, D]); unique_kv_cache as
                `unpack_paged_kv_cache` says; the result [B, Hq, D] in the dtype of q.
        Raises: RuntimeError without a plan; ValueError for a cache in another dtype than the plan's and for shapes.
        """
        return self._attend(self.batch, q, k_shared, v_shared, unique_kv_cache, None)


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper(_SharedPrefixWrapper):
    """Prefill where all sequences begin with one prefix: `begin_forward` once a step, `forward` once a layer."""

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        """Checks the rows and the pages that each sequence has alone and divides their work.

        Shapes: as BatchPrefillWithPagedKVCacheWrapper.plan. Dtypes are taken from what `forward` is given.
        Raises: ValueError, TypeError for what breaks these lines.
        """
        table = page_table(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, self.device)
        self._batch = plan_batch(
            qo_indptr,
            table,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            layout=self._kv_layout,
        )

    begin_forward = plan

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: PagedCache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """Attention of one layer; both parts are merged in float32 and rounded once.

        Shapes: q [T, Hq, D]; k_shared, v_shared [Lshared, Hk, D] ("HND": [Hk, Lshared, D]); unique_kv_cache as
                `unpack_paged_kv_cache` says; the result [T, Hq, D] in the dtype of q.
        Rule:   causal is that of what each sequence has alone; every row sees the whole prefix.
        Taken without effect: use_fp16_qk_reduction (accumulation is float32), rope_scale and rope_theta (nothing is
                rotated here).
        Raises: RuntimeError without a plan; ValueError for shapes.
        """
        key_pages, _ = unpack_paged_kv_cache(unique_kv_cache, self._kv_layout)
        batch = replace(self.batch.changed(causal=causal), kv_dtype=key_pages.dtype)
        return self._attend(batch, q, k_shared, v_shared, unique_kv_cache, sm_scale)


def _check_levels(name: str, arrays: Sequence[torch.Tensor] | None, num_levels: int) -> None:
    if not isinstance(arrays, Sequence) or len(arrays) != num_levels:
        got = len(arrays) if isinstance(arrays, Sequence) else type(arrays).__name__
        raise ValueError(f"{name} must be a list of {num_levels} tensors (one a level), got {got}.")
