"""Slots of a request's tokens, from its row of the block table."""

from __future__ import annotations

import torch

from ...shapes import check_int, dtype_name
from .between_graphs import runs_between_graphs
from .status import InfiniopError, InfiniStatus, as_infiniop_errors
from .tensor_memory import address_of, check_dense

__all__ = ["slots_of"]


@runs_between_graphs
def slots_of(block_table: torch.Tensor, start: int, num_tokens: int, block_size: int) -> torch.Tensor:
    """The slots of the tokens at positions [start, start + num_tokens) of one request, [num_tokens] int64.

    Shapes: block_table [M] int32 or int64, the blocks of the request in order; entries that are not needed may be
            anything, -1 as a rule.
    Raises: InfiniopError: NULL_POINTER, BAD_TENSOR_DTYPE, BAD_TENSOR_SHAPE; BAD_PARAM for a position beyond the
            blocks, for a block_size beyond int32, and for a needed block that is negative or has slots beyond int64.

    >>> slots_of(torch.tensor([7, 2, -1]), start=3, num_tokens=3, block_size=4)
    tensor([31,  8,  9])
    """
    check_dense("block_table", block_table)
    address_of("block_table", block_table)
    with as_infiniop_errors():
        check_int("start", start, minimum=0)
        check_int("num_tokens", num_tokens, minimum=0)
        check_int("block_size", block_size, minimum=1)
        if block_size >= 2**31:
            raise ValueError(f"block_size must be below 2**31, got {block_size}.")
    if block_table.dtype not in (torch.int32, torch.int64):
        raise InfiniopError(
            InfiniStatus.BAD_TENSOR_DTYPE,
            f"block_table must have dtype int32 or int64, got {dtype_name(block_table.dtype)}.",
        )
    if block_table.dim() != 1:
        raise InfiniopError(
            InfiniStatus.BAD_TENSOR_SHAPE, f"block_table must have shape [M], got {list(block_table.shape)}."
        )
    num_slots = block_table.shape[0] * block_size
    if start + num_tokens > num_slots:
        raise InfiniopError(
            InfiniStatus.BAD_PARAM,
            f"start + num_tokens must be at most {num_slots} (M * block_size slots), got {start + num_tokens}.",
        )
    positions = torch.arange(start, start + num_tokens, dtype=torch.int64, device=block_table.device)
    blocks = block_table.to(torch.int64)[positions // block_size]
    is_bad = (blocks < 0) | (blocks > 2**63 // block_size - 1)
    if bool(is_bad.any()):
        at = int(is_bad.int().argmax())
        raise InfiniopError(
            InfiniStatus.BAD_PARAM,
            f"block_table must name a block for position {start + at}, got {int(blocks[at])}.",
        )
    return blocks * block_size + positions % block_size
