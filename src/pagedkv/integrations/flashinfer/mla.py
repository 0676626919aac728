"""flashinfer.mla: multi-head latent attention over compressed pages, and the older wrapper for decode alone."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch

from ...shapes import Shapes
from .arguments import Dtype, Result, Scale, as_scalar, check_backend, refuse
from .latent import plan_latent, required_scale, run_latent
from .planned import Logits, PlannedBatch
from .tables import page_table as table_of_last_pages
from .tables import page_table_of_lengths, row_indptr
from .utils import log2e
from .vendor_only import Refused, lookup
from .wrapper import PlannedWrapper, fill_buffers

__all__ = [
    "BatchDecodeMlaWithPagedKVCacheWrapper",
    "BatchMLAPagedAttentionWrapper",
    "MLAHeadDimensions",
    "deepseek_mla_dimensions",
    "nope_mla_dimensions",
    "smaller_mla_dimensions",
    "supported_mla_head_dimensions",
]


@dataclass(frozen=True)
class MLAHeadDimensions:
    """Head dims of a model with latent attention: before compression, of the rotated part, and of the latent."""

    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int


deepseek_mla_dimensions = MLAHeadDimensions(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512)
smaller_mla_dimensions = MLAHeadDimensions(qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=256)
nope_mla_dimensions = MLAHeadDimensions(qk_nope_head_dim=256, qk_rope_head_dim=0, v_head_dim=256, kv_lora_rank=512)
# FlashInfer's list; the wrappers here take any other widths, too.
supported_mla_head_dimensions = [deepseek_mla_dimensions, smaller_mla_dimensions, nope_mla_dimensions]


# Width of a head before compression, without its rope key, where nothing tells of another.
_NOPE_DIM = deepseek_mla_dimensions.qk_nope_head_dim


class BatchMLAPagedAttentionWrapper(PlannedWrapper):
    """Latent attention over paged latents and rope keys of any widths: `plan` once a step, `run` once a layer.

    Buffers: with use_cuda_graph the four index buffers fix the batch size and are kept filled.
    backend: with "cutlass", `run` may be given lengths and a matrix of page ids, and no buffers are needed.
    Raises:  ValueError for an unaligned workspace, a missing buffer, an unknown back end.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        self._takes_matrix = backend == "cutlass"
        if not self._takes_matrix:
            check_backend(backend)
        super().__init__(float_workspace_buffer, use_cuda_graph=use_cuda_graph)
        self._buffers = {
            "qo_indptr": qo_indptr,
            "kv_indptr": kv_indptr,
            "kv_indices": kv_indices,
            "kv_len_arr": kv_len_arr,
        }
        if not self._takes_matrix:
            self._check_buffers(**self._buffers)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: Dtype,
        kv_data_type: Dtype,
        use_profiler: bool = False,
    ) -> None:
        """Checks the batch of a step and divides its work.

        Shapes: qo_indptr, kv_indptr [B + 1]; kv_indices [>= kv_indptr[-1]]; kv_len_arr [B], the tokens of each
                sequence, which may leave pages at its end unused; int32 or int64, on host or device.
                head_dim_ckv C >= 1; head_dim_kpe R >= 0. sm_scale has no default.
        Raises: ValueError, TypeError for what breaks these lines, and for a dtype other than float32, float16 and
                bfloat16; NotImplementedError for use_profiler.
        """
        refuse(use_profiler=use_profiler or None)
        table = page_table_of_lengths(kv_indptr, kv_indices, kv_len_arr, page_size, self.device)
        batch = plan_latent(
            qo_indptr,
            table,
            num_heads,
            head_dim_ckv,
            head_dim_kpe,
            causal=causal,
            logits=Logits(sm_scale=required_scale(sm_scale)),
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )
        if self._use_cuda_graph and not self._takes_matrix:
            given = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
            fill_buffers(self._buffers, dict(zip(self._buffers, given, strict=True)), "kv_indices")
        self._batch = batch

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor | None,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor | None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: Scale = None,
        *,
        ckv_scale: float | None = None,
        ckv_scale_arr: torch.Tensor | None = None,
        kpe_scale: float | None = None,
    ) -> Result:
        """Attention of one layer; latents serve as keys and as values.

        Shapes: q_nope [qo_indptr[-1], H, C]; q_pe [qo_indptr[-1], H, R]; ckv_cache [N, P, C]; kpe_cache [N, P, R],
                often views of one [N, P, C + R]; with R = 0 q_pe and kpe_cache are None or of width 0. out like
                q_nope; lse [T, H] float32, base 2, or natural with return_lse_base_on_e. With the back end "cutlass"
                kv_len [B] and page_table [B, M] take the place of the plan's pages: one row a sequence then, and
                page ids beyond kv_len are never used.
        Rule:   logit = sm_scale * (q_nope . ckv + q_pe . kpe); o_scale multiplies the output. profiler_buffer has no
                effect.
        Owns:   writes out and lse where given, else new tensors.
        Raises: ValueError for dtypes and rows other than the plan's and for shapes; RuntimeError without a plan or a
                matrix; NotImplementedError for ckv_scale, ckv_scale_arr and kpe_scale.
        """
        refuse(ckv_scale=ckv_scale, ckv_scale_arr=ckv_scale_arr, kpe_scale=kpe_scale)
        if kv_len is None and page_table is None:
            batch = self.batch
        else:
            batch = self._batch_of_matrix(kv_len, page_table, q_nope, ckv_cache, kpe_cache)
        return run_latent(
            batch,
            q_nope,
            q_pe,
            ckv_cache,
            kpe_cache,
            out_scale=as_scalar("o_scale", o_scale),
            out=out,
            lse=lse,
            return_lse=return_lse,
            lse_unit=1.0 if return_lse_base_on_e else log2e,
        )

    def _batch_of_matrix(
        self,
        kv_len: torch.Tensor | None,
        page_table: torch.Tensor | None,
        q_nope: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor | None,
    ) -> PlannedBatch:
        """One row a sequence over other pages, with the plan's scale; without a plan, with that of DeepSeek's heads."""
        if not self._takes_matrix:
            raise ValueError("kv_len and page_table must be given with backend='cutlass' only, got another back end.")
        if kv_len is None or page_table is None:
            missing = "kv_len" if kv_len is None else "page_table"
            raise ValueError(f"kv_len and page_table must be given together, got no {missing}.")
        shapes = Shapes()
        shapes.check("kv_len", kv_len, "B")
        shapes.check("page_table", page_table, "B M")
        shapes.check("q_nope", q_nope, "B H C")
        shapes.check("ckv_cache", ckv_cache, "N P C")
        rope_dim = 0 if kpe_cache is None else kpe_cache.shape[-1]
        before = self._batch
        starts = torch.arange(shapes["B"] + 1) * shapes["M"]
        return plan_latent(
            row_indptr(shapes["B"], 1, q_nope.device),
            page_table_of_lengths(starts, page_table.flatten(), kv_len, shapes["P"], q_nope.device),
            shapes["H"],
            shapes["C"],
            rope_dim,
            logits=Logits(sm_scale=(_NOPE_DIM + rope_dim) ** -0.5) if before is None else before.logits,
            q_data_type=q_nope.dtype if before is None else before.q_dtype,
            kv_data_type=ckv_cache.dtype if before is None else before.kv_dtype,
        )


class BatchDecodeMlaWithPagedKVCacheWrapper(PlannedWrapper):
    """Latent attention of one row a sequence, the name before BatchMLAPagedAttentionWrapper; rope keys are C / 8 wide.

    Buffers: with use_cuda_graph the three index buffers fix the batch size and are kept filled.
    Raises:  ValueError for an unaligned workspace or a missing buffer. Warns: DeprecationWarning when it is made.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        warnings.warn(
            "BatchDecodeMlaWithPagedKVCacheWrapper is deprecated: use BatchMLAPagedAttentionWrapper.",
            DeprecationWarning,
            stacklevel=2,
        )
        super().__init__(float_workspace_buffer, use_cuda_graph=use_cuda_graph)
        self._use_tensor_cores = use_tensor_cores
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
        head_dim_compressed_kv: int,
        page_size: int,
        sm_scale: float,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        data_type: Dtype = "float16",
        q_data_type: Dtype | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> None:
        """Checks the batch of a step and divides its work.

        Shapes: indptr [B + 1]; indices [>= indptr[-1]]; last_page_len [B], 1..page_size; int32 or int64, on host or
                device. q_data_type defaults to data_type, that of the cache.
        Taken without effect: rope_scale and rope_theta, for q_pe and rope keys come rotated.
        Raises: ValueError, TypeError for what breaks these lines; NotImplementedError for a soft cap.
        """
        logits = Logits(sm_scale=required_scale(sm_scale))
        refuse(logits_soft_cap=logits_soft_cap if logits_soft_cap and logits_soft_cap > 0 else None)
        table = table_of_last_pages(indptr, indices, last_page_len, page_size, self.device)
        batch = plan_latent(
            row_indptr(table.num_seqs, 1, table.indptr.device),
            table,
            num_qo_heads,
            head_dim_compressed_kv,
            head_dim_compressed_kv // 8,
            window_left=window_left,
            logits=logits,
            q_data_type=data_type if q_data_type is None else q_data_type,
            kv_data_type=data_type,
        )
        if self._use_cuda_graph:
            given = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
            fill_buffers(self._buffers, given, "indices")
        self._batch = batch

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        paged_ckv_cache: torch.Tensor,
        paged_kpe_cache: torch.Tensor,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool = False,
    ) -> Result:
        """Attention of one layer.

        Shapes: q_nope [B, H, C]; q_pe [B, H, C / 8]; paged_ckv_cache [N, P, C]; paged_kpe_cache [N, P, C / 8]; out
                like q_nope; lse [B, H] float32, base 2. q_scale and k_scale multiply sm_scale, v_scale the output.
        Owns:   writes out and lse where given, else new tensors.
        Raises: ValueError for dtypes and rows other than the plan's and for shapes.
        """
        return run_latent(
            self.batch,
            q_nope,
            q_pe,
            paged_ckv_cache,
            paged_kpe_cache,
            names=("q_nope", "q_pe", "paged_ckv_cache", "paged_kpe_cache"),
            logit_scale=as_scalar("q_scale", q_scale) * as_scalar("k_scale", k_scale),
            out_scale=as_scalar("v_scale", v_scale),
            out=out,
            lse=lse,
            return_lse=return_lse,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)


def __getattr__(name: str) -> Refused:
    """Names of one vendor's libraries: there to be imported, and refusing when used."""
    return lookup(name, __name__)
