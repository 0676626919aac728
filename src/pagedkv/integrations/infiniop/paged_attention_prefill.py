"""paged_attention_prefill: several query rows a sequence, causal, over the blocks of its table."""

from __future__ import annotations

from typing import Any

import torch

from .attention_descriptor import AttentionDescriptor, described_tensors, given_of, result_of, workspace_of
from .between_graphs import runs_between_graphs
from .handle import Handle, handle_of
from .operator_checks import check_handle
from .status import InfiniopError, InfiniStatus
from .tensor_descriptor import TensorLike

__all__ = ["PagedAttentionPrefillDescriptor", "paged_attention_prefill"]


class PagedAttentionPrefillDescriptor(AttentionDescriptor):
    """Prefill: several query rows a sequence, packed, causal, behind keys that may be there already.

    Shapes: as `PagedAttentionDescriptor`, but out [T, Hq, Dv], q [T, Hq, D] and cum_seq_lens_q [S + 1], where the rows
            of each sequence start: T is the last of them.
    Rule:   row i of a sequence stands at position seq_lens - q_len + i: seq_lens counts all keys, those of the new
            tokens included. A sequence without keys gives zeros.
    """

    _rows = "T"

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
        cum_seq_lens_q: TensorLike | None,
        alibi_slopes: TensorLike | None = None,
        scale: float = 1.0,
        k_scale: TensorLike | None = None,
        v_scale: TensorLike | None = None,
    ) -> PagedAttentionPrefillDescriptor:
        """Checks everything but values; keeps no tensor.

        Raises: as `PagedAttentionDescriptor.create`; BAD_PARAM for cum_seq_lens_q of another length than S + 1.
        """
        check_handle(handle)
        given = {"out": out, "q": q, "k_cache": k_cache, "v_cache": v_cache}
        given |= {"block_tables": block_tables, "seq_lens": seq_lens, "cum_seq_lens_q": cum_seq_lens_q}
        optional = {"alibi_slopes": alibi_slopes, "k_scale": k_scale, "v_scale": v_scale}
        tensors = described_tensors(handle, given, optional)
        descriptor = cls(handle, tensors, scale)
        starts, num_seqs = given_of(tensors, "cum_seq_lens_q").shape, descriptor._sizes["S"]
        if starts != (num_seqs + 1,):
            raise InfiniopError(
                InfiniStatus.BAD_PARAM,
                f"cum_seq_lens_q must have shape [S + 1] with S = {num_seqs} (set by block_tables), "
                f"got {list(starts)}.",
            )
        return descriptor

    def calculate(
        self,
        workspace: torch.Tensor | None,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        cum_seq_lens_q: torch.Tensor,
        alibi_slopes: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        *,
        stream: Any = None,
    ) -> None:
        """Fills out; tensors are as created.

        Raises: as `PagedAttentionDescriptor.calculate`; BAD_PARAM also for cum_seq_lens_q that does not divide the rows
                of q, and for a sequence with keys, but fewer than rows.
        """
        indices = block_tables, seq_lens, cum_seq_lens_q
        self._calculate(workspace, (out, q, k_cache, v_cache, *indices, alibi_slopes, k_scale, v_scale), stream)

    def _run(
        self,
        parts: list[torch.Tensor],
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        cum_seq_lens_q: torch.Tensor,
        alibi_slopes: torch.Tensor | None,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        indices = block_tables, seq_lens, cum_seq_lens_q
        self._attend(parts, out, q, (k_cache, v_cache), *indices, alibi_slopes, (k_scale, v_scale))


@runs_between_graphs
def paged_attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    history_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    alibi_slopes: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    out: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention of packed rows, [T, Hq, Dv]: into `out`, or into a new tensor of the values' dim.

    history_lens: whatever the name says, all keys of each sequence, those of the new tokens included.
    Shapes: as `PagedAttentionPrefillDescriptor`, which is made for the call; cu_seqlens_q is its cum_seq_lens_q.
    Raises: InfiniopError, with the codes of `create` and `calculate`.
    """
    handle, out = handle_of("q", q, backend), result_of(q, v_cache, out)
    options = alibi_slopes, scale, k_scale, v_scale
    tensors = out, q, k_cache, v_cache, block_tables, history_lens, cu_seqlens_q
    descriptor = PagedAttentionPrefillDescriptor.create(handle, *tensors, *options)
    descriptor.calculate(workspace_of(descriptor), *tensors, alibi_slopes, k_scale, v_scale)
    return out
