"""flashinfer.decode: one query row a sequence, or a few, over pages or contiguous keys and values."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from .arguments import Result, Scale, canonical_dtype, check_backend, int32_indices, refuse
from .layouts import PagedCache, unpack_paged_kv_cache
from .mla import BatchDecodeMlaWithPagedKVCacheWrapper
from .planned import Logits, plan_batch
from .single import attend_single
from .tables import page_table, row_indptr
from .vendor_only import Refused, lookup
from .wrapper import PlannedWrapper, check_window, extra_arguments, fill_buffers, takes_sinks

__all__ = [
    "BatchDecodeMlaWithPagedKVCacheWrapper",
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "single_decode_with_kv_cache",
]


# In the order in which older callers give them by position.
_PLAN_OPTIONS: dict[str, Any] = {
    "pos_encoding_mode": "NONE",
    "window_left": -1,
    "logits_soft_cap": None,
    "q_data_type": "float16",
    "kv_data_type": None,
    "o_data_type": None,
    "data_type": None,
    "sm_scale": None,
    "rope_scale": None,
    "rope_theta": None,
    "non_blocking": True,
    "block_tables": None,
    "seq_lens": None,
    "fixed_split_size": None,
    "disable_split_kv": False,
    "q_len_per_req": 1,
}


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Result:
    """Attention of one sequence's last row over contiguous keys and values.

    Shapes: q [Hq, D]; k, v [L, Hk, D] ("HND": [Hk, L, D]); out [Hq, D] in the dtype of q; lse [Hq] float32, base 2.
    Rule:   sm_scale defaults to 1 / sqrt(D); q_scale and k_scale multiply it, v_scale the output.
    Raises: KeyError for an unknown layout or position mode; ValueError for shapes and dtypes.
    """
    if q.dim() != 2:
        raise ValueError(f"q must have shape [Hq, D], got {list(q.shape)}.")
    result = attend_single(
        q[None],
        k,
        v,
        Logits(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta),
        kv_layout=kv_layout,
        window_left=window_left,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        return_lse=return_lse,
    )
    return (result[0][0], result[1][0]) if isinstance(result, tuple) else result[0]


class BatchDecodeWithPagedKVCacheWrapper(PlannedWrapper):
    """Decode over a paged cache: `plan` once a step, `run` once a layer.

    Buffers: with use_cuda_graph the three index buffers fix the batch size and are kept filled.
    Raises:  KeyError for an unknown layout; ValueError for an unaligned workspace, a missing buffer, an unknown back
             end; NotImplementedError for jit_args other than attention sinks.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        check_backend(backend)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._is_sink_variant = takes_sinks(jit_args)
        self._use_tensor_cores = use_tensor_cores
        self._q_len_per_req = 1
        self._buffers = {
            "indptr": paged_kv_indptr_buffer,
            "indices": paged_kv_indices_buffer,
            "last_page_len": paged_kv_last_page_len_buffer,
        }
        self._check_buffers(**{f"paged_kv_{name}_buffer": buffer for name, buffer in self._buffers.items()})

    @property
    def use_tensor_cores(self) -> bool:
        """What the wrapper was made with; results do not depend on it."""
        return self._use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *deprecated_positional_args: Any,
        window_right: int = 0,
        **kwargs: Any,
    ) -> None:
        """Checks the batch of a step and divides its work.

        Shapes: indptr [B + 1]; indices [>= indptr[-1]]; last_page_len [B], 1..page_size; int32 or int64, on host or
                device.
        Options: pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16",
                kv_data_type=None (that of q), o_data_type=None (that of q), data_type=None (older name of
                kv_data_type), sm_scale=None, rope_scale=None, rope_theta=None, q_len_per_req=1. More than one row a
                sequence needs use_tensor_cores and is causal among its rows.
        Taken without effect: non_blocking, block_tables, seq_lens, fixed_split_size and disable_split_kv (results
                never depend on the batch).
        Raises: KeyError, ValueError, TypeError for what breaks these lines.
        """
        options = _options(deprecated_positional_args, kwargs)
        q_len = options["q_len_per_req"]
        if not self._use_tensor_cores and (q_len != 1 or options["fixed_split_size"] is not None):
            name = "fixed_split_size" if q_len == 1 else "q_len_per_req > 1"
            raise ValueError(f"{name} needs use_tensor_cores=True, got False.")
        if q_len < 1:
            raise ValueError(f"q_len_per_req must be at least 1, got {q_len}.")
        if window_right:
            refuse(window_right=window_right)
        table = page_table(indptr, indices, last_page_len, page_size, self.device)
        if q_len > 1 and bool((table.seq_lens < q_len).any()):
            raise ValueError(
                f"every sequence must have at least q_len_per_req = {q_len} tokens, got {int(table.seq_lens.min())}."
            )
        legacy = options["data_type"]
        q_dtype = options["q_data_type"] or legacy or "float16"
        batch = plan_batch(
            row_indptr(table.num_seqs, q_len, table.indptr.device),
            table,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            causal=True,
            window_left=options["window_left"],
            logits=Logits(**{name: options[name] for name in Logits.__dataclass_fields__}),
            q_data_type=q_dtype,
            kv_data_type=options["kv_data_type"] or legacy,
            o_data_type=options["o_data_type"],
            layout=self._kv_layout,
        )
        if self._use_cuda_graph:
            given = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
            fill_buffers(self._buffers, given, "indices")
        self._batch, self._q_len_per_req = batch, q_len

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
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Result:
        """Attention of one layer.

        Shapes: q [B * q_len_per_req, Hq, D]; paged_kv_cache as `unpack_paged_kv_cache` says; out like q; lse [rows, Hq]
                float32, base 2; sinks [Hq] float32.
        Owns:   writes out and lse where given, else new tensors.
        Raises: ValueError for dtypes and rows other than the plan's and for shapes; AssertionError for another
                window_left.
        """
        refuse(kv_cache_sf=kv_cache_sf, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        batch = self.batch
        check_window(window_left, batch)
        if q_len_per_req is not None and q_len_per_req != self._q_len_per_req:
            raise ValueError(f"q_len_per_req must be {self._q_len_per_req} (set by plan), got {q_len_per_req}.")
        options = extra_arguments(
            args, self._is_sink_variant, q, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, sinks=sinks
        )
        key_pages, value_pages = unpack_paged_kv_cache(paged_kv_cache, self._kv_layout)
        return batch.run(
            q,
            key_pages,
            value_pages,
            **options,
            out=out,
            lse=lse,
            return_lse=return_lse,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        return_lse: bool = False,
    ) -> Result:
        """The older `run`: its options, defaults included, take the place of the plan's from here on."""
        batch = self.batch.changed(
            window_left=window_left,
            pos_encoding_mode=pos_encoding_mode,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        scales: dict[str, Any] = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        return self._run_changed(batch, lambda: self.run(q, paged_kv_cache, **scales, return_lse=return_lse))

    forward_return_lse = functools.partialmethod(forward, return_lse=True)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """The same in graph mode, with its buffers required."""

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer,
            kv_layout,
            True,
            use_tensor_cores,
            indptr_buffer,
            indices_buffer,
            last_page_len_buffer,
        )


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: str | torch.dtype | None = None,
    kv_data_type: str | torch.dtype | None = None,
    data_type: str | torch.dtype | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: torch.Tensor | None = None,
) -> None:
    """`plan` under the name by which engines replace it; dtypes that are not given stay those of the plan before.

    Shapes: as `plan`; global_override_indptr_cpu, indptr as the host has it already.
    Raises: RuntimeError without a plan before; what `plan` raises.
    """
    before = self.batch
    if data_type is not None:
        data_type = canonical_dtype("data_type", data_type)
        q_data_type = data_type if q_data_type is None else q_data_type
        kv_data_type = data_type if kv_data_type is None else kv_data_type
    # Not self.plan, in whose place this function stands.
    BatchDecodeWithPagedKVCacheWrapper.plan(
        self,
        indptr if global_override_indptr_cpu is None else int32_indices("indptr", global_override_indptr_cpu),
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        q_data_type=before.q_dtype if q_data_type is None else q_data_type,
        kv_data_type=before.kv_dtype if kv_data_type is None else kv_data_type,
        o_data_type=before.out_dtype if q_data_type is None else None,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        non_blocking=non_blocking,
        fixed_split_size=fixed_split_size,
        disable_split_kv=disable_split_kv,
        q_len_per_req=q_len_per_req,
    )


def _options(positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """All options of `plan` by name; by position they are deprecated, as in FlashInfer.

    Raises: TypeError for one that is unknown, given twice, or too many.
    """
    if not positional and not named:
        return _PLAN_OPTIONS
    unknown = [name for name in named if name not in _PLAN_OPTIONS]
    if unknown:
        raise TypeError(f"plan() got an unexpected keyword argument {unknown[0]!r}.")
    if len(positional) > len(_PLAN_OPTIONS):
        raise TypeError(f"plan() takes at most {len(_PLAN_OPTIONS)} options by position, got {len(positional)}.")
    by_position = dict(zip(_PLAN_OPTIONS, positional, strict=False))
    if by_position:
        twice = [name for name in named if name in by_position]
        if twice:
            raise TypeError(f"plan() got multiple values for argument {twice[0]!r}.")
        warnings.warn(
            f"Options of plan by position are deprecated: name {', '.join(by_position)}.",
            DeprecationWarning,
            stacklevel=3,
        )
    return {**_PLAN_OPTIONS, **by_position, **named}


def __getattr__(name: str) -> Refused:
    """Names of one vendor's libraries: there to be imported, and refusing when used."""
    return lookup(name, __name__)
