"""The kernel of rope_store_kv: a program takes tokens, and of each some of its queries, keys and values.

Tokens that share a slot: see shared_slots.py. A second launch is of keys and values alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantize_kernel import quantize_tile
from .rope import cos_sin, rotate_rows, rotated_pairs, store_pairs
from .shared_slots import is_last, last_with

__all__ = ["CLAIMS", "LOOKS_AHEAD", "SETS_RIGHT", "STRIDES", "rope_store_tokens"]

# How the last token of a slot wins: a constexpr of the kernel.
LOOKS_AHEAD = tl.constexpr(0)
CLAIMS = tl.constexpr(1)
SETS_RIGHT = tl.constexpr(2)

STRIDES = (
    *("stride_query_token", "stride_query_head"),
    *(f"stride_{side}_{of}" for side in ("key", "value") for of in ("token", "head", "page", "offset", "page_head")),
    *(f"stride_{side}_scale_{of}" for side in ("key", "value") for of in ("page", "offset", "head")),
)


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "claims_mask", "heads_of_program"])
def rope_store_tokens(
    Query,
    Key,
    Value,
    Positions,
    Turns,
    Key_pages,
    Value_pages,
    Key_scales,
    Value_scales,
    Slots,
    Claims,
    Out,
    num_tokens,
    num_slots,
    claims_mask,
    num_q_heads,
    num_kv_heads,
    heads_of_program,
    stride_query_token,
    stride_query_head,
    stride_key_token,
    stride_key_head,
    stride_key_page,
    stride_key_offset,
    stride_key_page_head,
    stride_value_token,
    stride_value_head,
    stride_value_page,
    stride_value_offset,
    stride_value_page_head,
    stride_key_scale_page,
    stride_key_scale_offset,
    stride_key_scale_head,
    stride_value_scale_page,
    stride_value_scale_offset,
    stride_value_scale_head,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CODES: tl.constexpr,  # of quantize_kernel.py; 0: pages of the dtype of key and value
    SHARED_SLOTS: tl.constexpr,
    SCAN: tl.constexpr,  # tokens that are looked through in one step
):
    """The heads of a token are counted through: of its queries, its keys, its values."""
    num_heads = num_q_heads + 2 * num_kv_heads
    programs = tl.cdiv(num_heads, heads_of_program)
    first = tl.program_id(0).to(tl.int64) // programs * BLOCK_TOKENS
    start = tl.program_id(0) % programs * heads_of_program
    stop = tl.minimum(start + heads_of_program, num_heads)
    token = first + tl.arange(0, BLOCK_TOKENS)
    exists = token < num_tokens
    slot = tl.load(Slots + token, mask=exists, other=-1)
    is_stored = (slot >= 0) & (slot < num_slots)
    if SHARED_SLOTS == LOOKS_AHEAD:
        if stop > num_q_heads:
            is_stored = is_stored & is_last(Slots, slot, first, num_tokens, SCAN)
    elif SHARED_SLOTS == CLAIMS:
        tl.store(Claims + (slot & claims_mask), token.to(tl.int32), mask=is_stored & (start == 0))
    else:
        claim = tl.load(Claims + (slot & claims_mask), mask=is_stored, other=0)
        is_stored = is_stored & (claim != token)
        if tl.max(is_stored.to(tl.int32), 0) == 0:
            stop = start
        else:
            token = last_with(Slots, slot, token, is_stored, num_tokens, SCAN)
    position = tl.load(Positions + token, mask=exists, other=0)
    cos, sin = cos_sin(position, Turns, HALF, BLOCK_HALF)
    exists, stored = exists[:, None], is_stored[:, None]
    slot = tl.where(is_stored, slot, 0)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE

    Query += (token * stride_query_token)[:, None]
    Out += (token * (num_q_heads * DIM))[:, None]
    for head in range(start, tl.minimum(stop, num_q_heads)):
        rows = Query + tl.cast(head, tl.int64) * stride_query_head
        rotate_rows(rows, Out + head * DIM, exists, cos, sin, DIM, HALF, BLOCK_REST, IS_INTERLEAVED)

    start, stop = tl.maximum(start - num_q_heads, 0), stop - num_q_heads
    Key += (token * stride_key_token)[:, None]
    Key_pages += (page * stride_key_page + offset * stride_key_offset)[:, None]
    for head in range(start, tl.minimum(stop, num_kv_heads)):
        kv_head = tl.cast(head, tl.int64)
        rows, pages = Key + kv_head * stride_key_head, Key_pages + kv_head * stride_key_page_head
        if CODES == 0:
            rotate_rows(rows, pages, stored, cos, sin, DIM, HALF, BLOCK_REST, IS_INTERLEAVED)
        else:
            scale_at = page * stride_key_scale_page + offset * stride_key_scale_offset + kv_head * stride_key_scale_head
            scales = _rotate_to_codes(rows, pages, stored, cos, sin, DIM, HALF, BLOCK_REST, IS_INTERLEAVED, CODES)
            tl.store(Key_scales + scale_at, scales, mask=is_stored)

    start, stop = tl.maximum(start - num_kv_heads, 0), stop - num_kv_heads
    Value += (token * stride_value_token)[:, None]
    Value_pages += (page * stride_value_page + offset * stride_value_offset)[:, None]
    column = tl.arange(0, BLOCK_VALUE)[None, :]
    is_value = stored & (column < VALUE_DIM)
    for head in range(start, stop):
        kv_head = tl.cast(head, tl.int64)
        pages = Value_pages + kv_head * stride_value_page_head + column
        values = tl.load(Value + kv_head * stride_value_head + column, mask=is_value, other=0.0)
        if CODES == 0:
            tl.store(pages, values, mask=is_value)
        else:
            scale_at = page * stride_value_scale_page + offset * stride_value_scale_offset
            codes, scales = quantize_tile(values.to(tl.float32), CODES)
            tl.store(pages, codes, mask=is_value)
            tl.store(Value_scales + scale_at + kv_head * stride_value_scale_head, scales, mask=is_stored)


@triton.jit
def _rotate_to_codes(
    rows,
    codes_rows,
    mask,
    cos,
    sin,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    CODES: tl.constexpr,
):
    """Turns the rows that start at rows [T, 1], rounds them to their dtype, writes their codes; gives scales [T]."""
    BLOCK_TOKENS: tl.constexpr = cos.shape[0]
    BLOCK_HALF: tl.constexpr = cos.shape[1]
    first, second = rotated_pairs(rows, mask, cos, sin, HALF, IS_INTERLEAVED)
    # Quantised as one tile, whose columns may lie in any order; the columns beyond a row's end are zeros there.
    x = tl.reshape(tl.join(first, second).to(tl.float32), (BLOCK_TOKENS, 2 * BLOCK_HALF))
    if BLOCK_REST > 0:
        column = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        is_rest = mask & (column < DIM)
        rest = tl.load(rows + column, mask=is_rest, other=0.0).to(tl.float32)
        x = tl.reshape(tl.join(x, rest), (BLOCK_TOKENS, 2 * BLOCK_REST))
    codes, scales = quantize_tile(x, CODES)
    if BLOCK_REST > 0:
        codes, rest_codes = tl.split(tl.reshape(codes, (BLOCK_TOKENS, BLOCK_REST, 2)))
        tl.store(codes_rows + column, rest_codes, mask=is_rest)
    first_codes, second_codes = tl.split(tl.reshape(codes, (BLOCK_TOKENS, BLOCK_HALF, 2)))
    store_pairs(codes_rows, first_codes, second_codes, mask, HALF, IS_INTERLEAVED)
    return scales
