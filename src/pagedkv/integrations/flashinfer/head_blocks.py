"""Blocks of keys chosen by KV head: heads laid one after the other, each with its rows of blocks, as one batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...shapes import Shapes, check_int
from ...storage import PageTable
from .arguments import Result, Scale, as_scalar, check_result_buffer, int32_indices
from .planned import Logits, PlannedBatch, plan_batch

__all__ = ["indptr_of", "into", "of_kv_heads", "plan_by_head", "run_by_head", "with_logits"]


def plan_by_head(
    block_mask: torch.Tensor,
    row_sizes: torch.Tensor,
    col_sizes: torch.Tensor,
    device: torch.device | None,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    **options: Any,
) -> PlannedBatch:
    """One sequence a KV head and row of blocks, over pages of the heads' keys laid one head after the other.

    Shapes: block_mask [Hk, MB, NB] bool; row_sizes [Hk, MB]; col_sizes [Hk, NB].
    """
    _refuse_alibi(options["logits"])
    check_int("num_kv_heads", num_kv_heads, minimum=1)
    if num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads must be a multiple of num_kv_heads = {num_kv_heads}, got {num_qo_heads}.")
    shapes = Shapes(Hk=num_kv_heads)
    shapes.check("block_mask_map", block_mask, "Hk MB NB")
    sizes = []
    for name, tensor, pattern in (("block_row_sz", row_sizes, "Hk MB"), ("block_col_sz", col_sizes, "Hk NB")):
        shapes.check(name, tensor, pattern)
        array = int32_indices(name, tensor).cpu().numpy().astype(np.int64)
        if array.size and array.min() < 0:
            raise ValueError(f"{name} must not be negative, got {array.min()}.")
        sums = array.sum(1)
        if (sums != sums[0]).any():
            raise ValueError(f"{name} must have the same sum for every head, got {sums.tolist()}.")
        sizes.append(array)
    rows, cols = sizes
    # The longest pages that no block ends within.
    page_size = int(np.gcd.reduce(cols, axis=None)) or 1
    pages = (cols // page_size).reshape(-1)
    first = pages.cumsum() - pages
    chosen = block_mask.cpu().numpy()
    head, _, col = chosen.nonzero()
    counts = pages[head * cols.shape[1] + col]
    starts = first[head * cols.shape[1] + col] - (counts.cumsum() - counts)
    ids = np.repeat(starts, counts) + np.arange(counts.sum())
    held = (chosen * (cols // page_size)[:, None]).sum(2).reshape(-1)
    device = block_mask.device if device is None else device
    arrays = (np.concatenate([[0], held.cumsum()]), ids, np.where(held > 0, page_size, 0))
    table = PageTable(*(torch.from_numpy(a.astype(np.int32)).to(device) for a in arrays), page_size=page_size)
    return plan_batch(
        indptr_of(torch.from_numpy(rows.reshape(-1))),
        table,
        num_qo_heads=num_qo_heads // num_kv_heads,
        num_kv_heads=1,
        head_dim_qk=head_dim,
        **options,
    )


def run_by_head(
    batch: PlannedBatch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [Hq, M, D]; k, v [Hk, N, D]; returns out [Hq, M, D] and lse [Hq, M], views."""
    num_kv_heads, group, size = k.shape[0], batch.plan.num_q_heads, batch.plan.page_size
    num_rows, dim = q.shape[1:]
    rows = q.reshape(num_kv_heads, group, num_rows, dim).transpose(1, 2).reshape(-1, group, dim)
    # Pages of the heads laid one after the other: views where k and v have no gaps.
    pages = (x.reshape(num_kv_heads * x.shape[1] // size, size, 1, x.shape[2]) for x in (k, v))
    # The plan's heads are those of one group: a factor a head would meet the wrong ones.
    scales = (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale))
    given: dict[str, Any] = {name: as_scalar(name, scale) for name, scale in scales if scale is not None}
    results = batch.run_with_lse(rows, *pages, **given)
    out, lse = (x.reshape(num_kv_heads, num_rows, *x.shape[1:]).transpose(1, 2) for x in results)
    return out.flatten(0, 1), lse.flatten(0, 1)


def into(
    batch: PlannedBatch,
    result: torch.Tensor,
    sums: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    return_lse: bool,
) -> Result:
    """Results in the buffers that were given, which are written only where both are as they must be."""
    if out is not None:
        check_result_buffer("out", out, tuple(result.shape), batch.out_dtype, result.device)
    if lse is not None:
        check_result_buffer("lse", lse, tuple(sums.shape), torch.float32, result.device)
    result = result.contiguous() if out is None else out.copy_(result)
    if lse is not None:
        sums = lse.copy_(sums)
    return (result, sums.contiguous()) if return_lse else result


def with_logits(batch: PlannedBatch, logits: Logits, is_by_head: bool) -> PlannedBatch:
    if is_by_head:
        _refuse_alibi(logits)
    return batch.changed(**vars(logits))


def _refuse_alibi(logits: Logits) -> None:
    if logits.pos_encoding_mode == "ALIBI":
        raise NotImplementedError(
            "pos_encoding_mode ALIBI is not supported with blocks chosen by head: slopes differ by head. Use "
            "BlockSparseAttentionWrapper with indptr and indices."
        )


def of_kv_heads(
    block_mask: torch.Tensor, num_qo_heads: int, num_kv_heads: int, num_block_rows: int, num_block_cols: int
) -> torch.Tensor:
    """[Hk, MB, NB] of a mask by KV head, or by query head where those of a group agree."""
    shape = (num_block_rows, num_block_cols)
    if tuple(block_mask.shape) == (num_kv_heads, *shape):
        return block_mask
    if tuple(block_mask.shape) != (num_qo_heads, *shape) or num_qo_heads % num_kv_heads:
        raise ValueError(
            f"block_mask must have shape {list(shape)}, [{num_kv_heads}, MB, NB] or [{num_qo_heads}, MB, NB], "
            f"got {list(block_mask.shape)}."
        )
    groups: torch.Tensor = block_mask.reshape(num_kv_heads, num_qo_heads // num_kv_heads, *shape)
    if bool((groups != groups[:, :1]).any()):
        raise ValueError("block_mask must be the same for all query heads of a group, got masks that differ.")
    return groups[:, 0]


def indptr_of(counts: torch.Tensor) -> torch.Tensor:
    """[B + 1] int64: where each part begins, on the host's or the tensor's own device."""
    return torch.nn.functional.pad(counts.to(torch.int64).cumsum(0), (1, 0))
