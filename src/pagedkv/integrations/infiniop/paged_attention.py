"""paged_attention: one query row a sequence over the blocks of its table."""

from __future__ import annotations

from typing import Any

import torch

from .attention_descriptor import AttentionDescriptor, described_tensors, result_of, workspace_of
from .between_graphs import runs_between_graphs
from .handle import Handle, handle_of
from .operator_checks import check_handle
from .tensor_descriptor import TensorLike

__all__ = ["PagedAttentionDescriptor", "paged_attention"]


class PagedAttentionDescriptor(AttentionDescriptor):
    """Decode: one query row a sequence, at its last position.

    Shapes: out [S, Hq, Dv]; q [S, Hq, D]; k_cache [N, Hk, P, D]; v_cache [N, Hk, P, Dv]; block_tables [S, M]; seq_lens
            [S], keys of each sequence, that of the row included; alibi_slopes [Hq] float32. Last dims of q, out and
            caches are contiguous, other strides are free.
    Dtypes: float32, float16, bfloat16, the same for out, q and caches; or float8_e4m3fn caches with k_scale and v_scale
            [N, Hk, P] float32. Indices are int32, int64 or uint32, both the same.
    Rule:   softmax(scale * q.k + slope * (key position - row position)); a sequence without keys gives zeros.
    """

    @classmethod
    @runs_between_graphs
    def create(
        cls,
        handle: Handle,
        out: TensorLike | None,
        q: TensorLike | None,
        k_cache: TensorLike | None,
        v_cache: TensorLike | None,
        block_tables: TensorLike | None,
        seq_lens: TensorLike | None,
        alibi_slopes: TensorLike | None = None,
        scale: float = 1.0,
        k_scale: TensorLike | None = None,
        v_scale: TensorLike | None = None,
    ) -> PagedAttentionDescriptor:
        """Checks everything but values; keeps no tensor.

        Raises: InfiniopError: NULL_POINTER, BAD_TENSOR_DTYPE, BAD_TENSOR_SHAPE, BAD_PARAM, BAD_TENSOR_STRIDES,
                DEVICE_TYPE_NOT_SUPPORTED.
        """
        check_handle(handle)
        given = {"out": out, "q": q, "k_cache": k_cache, "v_cache": v_cache}
        given |= {"block_tables": block_tables, "seq_lens": seq_lens}
        optional = {"alibi_slopes": alibi_slopes, "k_scale": k_scale, "v_scale": v_scale}
        tensors = described_tensors(handle, given, optional)
        return cls(handle, tensors, scale)

    def calculate(
        self,
        workspace: torch.Tensor | None,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        alibi_slopes: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        *,
        stream: Any = None,
    ) -> None:
        """Fills out; tensors are as created.

        Raises: InfiniopError: the status of what is not as created; INSUFFICIENT_WORKSPACE; BAD_PARAM for a length
                beyond the table, a block beyond the caches, an out that overlaps any other, and after destroy.
        """
        tensors = out, q, k_cache, v_cache, block_tables, seq_lens, alibi_slopes, k_scale, v_scale
        self._calculate(workspace, tensors, stream)

    def _run(
        self,
        parts: list[torch.Tensor],
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        alibi_slopes: torch.Tensor | None,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        caches, scales = (k_cache, v_cache), (k_scale, v_scale)
        self._attend(parts, out, q, caches, block_tables, seq_lens, None, alibi_slopes, scales)


@runs_between_graphs
def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cache_lens: torch.Tensor,
    alibi_slopes: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    out: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Decode attention, [S, Hq, Dv]: into `out`, or into a new tensor of the values' dim.

    Shapes: as `PagedAttentionDescriptor`, which is made for the call; cache_lens are its seq_lens.
    Raises: InfiniopError, with the codes of `create` and `calculate`.

    >>> from pagedkv.integrations import infiniop
    >>> k_cache, v_cache = torch.randn(2, 4, 2, 16, 64)
    >>> tables, lens = torch.tensor([[3, 1], [2, -1]]), torch.tensor([20, 7])
    >>> infiniop.paged_attention(torch.randn(2, 8, 64), k_cache, v_cache, tables, lens, scale=0.125).shape
    torch.Size([2, 8, 64])
    """
    handle, out = handle_of("q", q, backend), result_of(q, v_cache, out)
    options = alibi_slopes, scale, k_scale, v_scale
    tensors = out, q, k_cache, v_cache, block_tables, cache_lens
    descriptor = PagedAttentionDescriptor.create(handle, *tensors, *options)
    descriptor.calculate(workspace_of(descriptor), *tensors, alibi_slopes, k_scale, v_scale)
    return out
