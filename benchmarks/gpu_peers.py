"""Who runs beside ours on a GPU: torch on contiguous memory, and FlashInfer on the same pages where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .gpu_batch import GpuBatch

__all__ = ["flashinfer_run", "has_flashinfer", "sdpa_run"]

Run = Callable[[int], object]

_WORKSPACE_BYTES = 256 << 20


def has_flashinfer() -> bool:
    """Whether FlashInfer is installed."""
    return importlib.util.find_spec("flashinfer") is not None


def flashinfer_run(batch: GpuBatch) -> Run:
    """Its wrapper for decode or for prefill, planned on the batch; scales of tokens are not its business.

    Raises: whatever FlashInfer raises when it cannot be imported or cannot compile.
    """
    import flashinfer  # type: ignore[import-not-found]

    shape = batch.shape
    device = batch.query.device
    indptr, indices = batch.table.indptr, batch.table.indices
    last_page_len = batch.table.last_page_len
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    dtypes = {"q_data_type": batch.query.dtype, "kv_data_type": shape.dtype}
    wrapper: Any
    if shape.q_len == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(indptr, indices, last_page_len, *heads, shape.page_size, **dtypes)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        page = shape.page_size
        wrapper.plan(batch.query_indptr, indptr, indices, last_page_len, *heads, page, causal=True, **dtypes)
    return lambda i: wrapper.run(batch.query, (batch.key, batch.value))


def sdpa_run(batch: GpuBatch) -> Run:
    """torch's attention on contiguous keys and values: sees no page table."""
    shape = batch.shape
    key, value = batch.contiguous()
    query = batch.query.view(shape.num_seqs, shape.q_len, shape.num_q_heads, shape.head_dim).transpose(1, 2)
    is_square = shape.q_len == shape.kv_len
    if shape.q_len > 1 and not is_square:
        raise ValueError("torch's causal flag is aligned to the top left: only square batches have this peer.")

    def run(i: int) -> object:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_square, enable_gqa=True)

    return run
