"""flashinfer.sparse: attention over chosen blocks of keys, each row of blocks a sequence whose pages are the blocks."""

from __future__ import annotations

from typing import Any

import torch

from ...shapes import Shapes, check_dtype, check_int
from .arguments import Dtype, Result, Scale, check_backend, int32_indices
from .head_blocks import indptr_of, into, of_kv_heads, plan_by_head, run_by_head, with_logits
from .planned import Logits, plan_batch
from .tables import page_table
from .wrapper import PlannedWrapper

__all__ = ["BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper", "convert_bsr_mask_layout"]


def convert_bsr_mask_layout(mask: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    """The masks of blocks, one block after the other, as the flat mask of a batch: row by row over all its blocks.

    Shapes: mask [nnz, R, C]; indptr [MB + 1] int32 or int64, indptr[-1] = nnz; the result [nnz * R * C], each row of
            blocks as [R, blocks * C], row-major.
    Raises: ValueError, TypeError for what breaks these lines.

    >>> convert_bsr_mask_layout(torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]), torch.tensor([0, 2])).tolist()
    [1, 2, 5, 6, 3, 4, 7, 8]
    """
    Shapes().check("mask", mask, "nnz R C")
    counts = _row_counts(indptr)
    if sum(counts) != mask.shape[0]:
        raise ValueError(f"mask must have indptr[-1] = {sum(counts)} blocks, got {mask.shape[0]}.")
    parts = [blocks.transpose(0, 1).reshape(-1) for blocks in torch.split(mask, counts)] if counts else []
    return torch.cat(parts) if parts else mask.reshape(-1)


class BlockSparseAttentionWrapper(PlannedWrapper):
    """Attention where blocks of R rows see chosen blocks of C keys: `plan` once, `run` once a layer.

    Raises: ValueError for an unaligned workspace, an unknown back end.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor | None, backend: str = "auto") -> None:
        check_backend(backend)
        super().__init__(float_workspace_buffer)
        self._num_rows = self._num_keys = 0
        self._num_heads = 0, 0
        self._is_by_head = False

    def plan(
        self,
        indptr: torch.Tensor | None,
        indices: torch.Tensor | None,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: torch.Tensor | None = None,
        packed_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype | None = None,
        o_data_type: Dtype = "float16",
        non_blocking: bool = True,
        block_mask: torch.Tensor | None = None,
    ) -> None:
        """Checks the blocks that M rows see of N keys and divides the work.

        Shapes: indptr [MB + 1], indices [>= indptr[-1]] int32 or int64, the column blocks of each row of blocks, with
                MB = ceil(M / R) (the last one may have fewer rows) and NB = N / C; mask [nnz, R, C] bool, True = keep,
                in place of causal; or packed_mask uint8, the lowest bit first, each row of blocks as [R, blocks * C]
                from a byte of its own on. In place of indptr and indices: block_mask [MB, NB] bool, or
                [num_kv_heads, MB, NB], also [num_qo_heads, MB, NB] where the heads of a group agree.
        Rule:   rows and keys are counted within the chosen blocks: with n keys chosen, row i of its block stands at
                n - R + i. So causal is the triangle at the right end of the chosen blocks, not that of the whole
                matrix, and rotation and ALiBi follow these positions, too.
        Raises: ValueError with "indices out of bound" for a block beyond N; ValueError for N that is no multiple of C;
                ValueError, TypeError for what else breaks these lines; KeyError for an unknown position mode;
                NotImplementedError for ALiBi with a block_mask by head.
        """
        for name, value, least in (("M", M, 0), ("N", N, 0), ("R", R, 1), ("C", C, 1)):
            check_int(name, value, minimum=least)
        if N % C:
            raise ValueError(f"N must be a multiple of C = {C}, got {N}.")
        num_block_rows, num_block_cols = -(-M // R), N // C
        options: dict[str, Any] = {
            "causal": causal,
            "logits": Logits(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta),
            "q_data_type": q_data_type,
            "kv_data_type": kv_data_type,
            "o_data_type": o_data_type,
        }
        heads = num_qo_heads, num_kv_heads, head_dim
        is_by_head = block_mask is not None and block_mask.dim() == 3
        if block_mask is not None:
            check_dtype("block_mask", block_mask, torch.bool)
            if mask is not None or packed_mask is not None:
                raise ValueError(
                    "block_mask must be given without mask and packed_mask, got both. Pass indptr instead."
                )
        row_sizes = torch.full((num_block_rows,), R)
        row_sizes[-1:] -= num_block_rows * R - M
        if block_mask is not None and is_by_head:
            block_mask = of_kv_heads(block_mask, num_qo_heads, num_kv_heads, num_block_rows, num_block_cols)
            row_sizes = row_sizes.expand(num_kv_heads, -1)
            col_sizes = torch.full((num_kv_heads, num_block_cols), C)
            batch = plan_by_head(block_mask, row_sizes, col_sizes, self.device, *heads, **options)
        else:
            if block_mask is not None:
                Shapes(MB=num_block_rows, NB=num_block_cols).check("block_mask", block_mask, "MB NB")
                rows, indices = (part.to(torch.int32) for part in block_mask.nonzero(as_tuple=True))
                indptr = indptr_of(torch.bincount(rows, minlength=num_block_rows))
            if indptr is None or indices is None:
                raise ValueError("indptr and indices must be given where block_mask is not, got None.")
            counts = _row_counts(indptr)
            if len(counts) != num_block_rows:
                raise ValueError(
                    f"indptr must have shape [MB + 1] with MB = {num_block_rows} (set by M and R), "
                    f"got {list(indptr.shape)}."
                )
            _check_bounds(indices[: sum(counts)], C, N)
            full = torch.full((num_block_rows,), C, dtype=torch.int32)
            table = page_table(indptr, indices, full, C, indptr.device if self.device is None else self.device)
            if mask is not None:
                flat = convert_bsr_mask_layout(mask, indptr)
                # The last row of blocks is without the rows beyond M.
                missing = (num_block_rows * R - M) * C * (counts[-1] if counts else 0)
                mask = flat[: flat.shape[0] - missing]
            batch = plan_batch(
                indptr_of(row_sizes),
                table,
                num_qo_heads=num_qo_heads,
                num_kv_heads=num_kv_heads,
                head_dim_qk=head_dim,
                custom_mask=mask,
                packed_custom_mask=packed_mask,
                **options,
            )
        self._batch, self._num_rows, self._num_keys, self._is_by_head = batch, M, N, is_by_head
        self._num_heads = num_qo_heads, num_kv_heads

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale_q: Scale = None,
        scale_k: Scale = None,
        scale_v: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Result:
        """Attention of one layer.

        Shapes: q [M, Hq, D]; k, v [N, Hk, D]; scales a number or a tensor of one element: scale_q and scale_k multiply
                the logits, scale_v the output; out [M, Hq, D] in the plan's o_data_type; lse [M, Hq] float32, base 2.
        Owns:   writes out and lse where given, else new tensors.
        Raises: RuntimeError without a plan; ValueError for dtypes other than the plan's and for shapes.
        """
        batch = self.batch
        shapes = Shapes(M=self._num_rows, N=self._num_keys, Hq=self._num_heads[0], Hk=self._num_heads[1])
        shapes.check("q", q, "M Hq D")
        for name, packed in (("k", k), ("v", v)):
            shapes.check(name, packed, "N Hk D")
        if self._is_by_head:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            result, sums = run_by_head(batch, q, k, v, q_scale=scale_q, k_scale=scale_k, v_scale=scale_v)
            return into(batch, result.transpose(0, 1), sums.T, out, lse, return_lse)
        size = batch.plan.page_size
        key_pages, value_pages = (x.reshape(self._num_keys // size, size, *x.shape[1:]) for x in (k, v))
        return batch.run(
            q,
            key_pages,
            value_pages,
            q_scale=scale_q,
            k_scale=scale_k,
            v_scale=scale_v,
            out=out,
            lse=lse,
            return_lse=return_lse,
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale_q: Scale = None,
        scale_k: Scale = None,
        scale_v: Scale = None,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Result:
        """The older `run`: its options, defaults included, take the place of the plan's from here on."""
        logits = Logits(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)
        batch = with_logits(self.batch, logits, self._is_by_head)
        return self._run_changed(batch, lambda: self.run(q, k, v, scale_q, scale_k, scale_v))


class VariableBlockSparseAttentionWrapper(PlannedWrapper):
    """Attention where blocks of rows see chosen blocks of keys, of any sizes and by KV head: `plan` once, `run` once
    a layer.

    Raises: ValueError for an unaligned workspace, an unknown back end.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor | None, backend: str = "auto") -> None:
        check_backend(backend)
        super().__init__(float_workspace_buffer)
        self._num_q_heads = self._num_kv_heads = self._num_rows = self._num_keys = 0

    def plan(
        self,
        block_mask_map: torch.Tensor,
        block_row_sz: torch.Tensor,
        block_col_sz: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype | None = None,
    ) -> None:
        """Checks the blocks and divides the work.

        Shapes: block_mask_map [Hk, MB, NB], bool or integer, nonzero = seen; block_row_sz [Hk, MB], block_col_sz
                [Hk, NB] int32 or int64, the rows and keys of each block, 0 included, with the same sum for every head.
        Rule:   positions are those within the chosen blocks, as in BlockSparseAttentionWrapper.plan; causal is the
                triangle at the right end of what each row of blocks sees.
        Raises: ValueError, TypeError for what breaks these lines; KeyError for an unknown position mode;
                NotImplementedError for ALiBi, whose slopes would differ by KV head.
        """
        Shapes(Hk=num_kv_heads).check("block_mask_map", block_mask_map, "Hk MB NB")
        batch = plan_by_head(
            block_mask_map != 0,
            block_row_sz,
            block_col_sz,
            self.device,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            causal=causal,
            logits=Logits(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta),
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )
        self._num_rows = batch.plan.num_tokens // num_kv_heads
        self._num_keys = int(block_col_sz[0].sum())
        self._batch, self._num_q_heads, self._num_kv_heads = batch, num_qo_heads, num_kv_heads

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Result:
        """Attention of one layer.

        Shapes: q [Hq, qo_len, D]; k, v [Hk, kv_len, D]; out [Hq, qo_len, D] in the dtype of q; lse [Hq, qo_len]
                float32, base 2.
        Owns:   writes out and lse where given, else new tensors.
        Raises: RuntimeError without a plan; ValueError for dtypes other than the plan's and for shapes.
        """
        batch = self.batch
        Shapes(Hq=self._num_q_heads, qo_len=self._num_rows).check("q", q, "Hq qo_len D")
        shapes = Shapes(Hk=self._num_kv_heads, kv_len=self._num_keys)
        for name, packed in (("k", k), ("v", v)):
            shapes.check(name, packed, "Hk kv_len D")
        return into(batch, *run_by_head(batch, q, k, v), out, lse, return_lse)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Result:
        """The older `run`: its options, defaults included, take the place of the plan's from here on."""
        logits = Logits(pos_encoding_mode, sm_scale, logits_soft_cap, rope_scale, rope_theta)
        batch = with_logits(self.batch, logits, True)
        return self._run_changed(batch, lambda: self.run(q, k, v))


def _check_bounds(indices: torch.Tensor, block_size: int, num_keys: int) -> None:
    if not indices.numel():
        return
    lowest, highest = int(indices.min()), int(indices.max())
    if lowest < 0 or (highest + 1) * block_size > num_keys:
        raise ValueError(
            f"indices out of bound: they must be in 0..{num_keys // block_size - 1} (N / C - 1), got "
            f"{lowest if lowest < 0 else highest}."
        )


def _row_counts(indptr: torch.Tensor) -> list[int]:
    """Blocks of each row of blocks."""
    starts = int32_indices("indptr", indptr).cpu().long()
    if starts.dim() != 1 or not starts.shape[0] or int(starts[0]) != 0 or bool((starts.diff() < 0).any()):
        raise ValueError(f"indptr must be a row that starts with 0 and does not decrease, got {starts.tolist()}.")
    counts: list[int] = starts.diff().tolist()
    return counts
