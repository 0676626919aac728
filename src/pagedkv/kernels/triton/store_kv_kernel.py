"""The kernel of store_kv: a program moves, or quantises, a part of some tokens into their slots.

Tokens that share a slot: see shared_slots.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .move_kernel import move_rows
from .quantize_kernel import quantize_rows
from .shared_slots import is_last, last_with

__all__ = ["STRIDES", "store_tokens"]

# Of key, then of value: strides in vectors, those of scales in elements.
STRIDES = tuple(
    f"stride_{side}_{of}"
    for side in ("key", "value")
    for of in ("token", "head", "page", "offset", "page_head", "scale_page", "scale_head", "scale_offset")
)


@triton.jit
def store_rows(
    Source,
    Pages,
    Scales,
    token,
    slot,
    is_read,
    is_stored,
    chunk,
    stride_token,
    stride_head,
    stride_page,
    stride_offset,
    stride_page_head,
    stride_scale_page,
    stride_scale_head,
    stride_scale_offset,
    PAGE_SIZE: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    SOURCE_VECTOR: tl.constexpr,
    PAGES_VECTOR: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """One chunk of each token of [BLOCK_ROWS] into its slot: vectors of all heads, or, to be quantised, one head."""
    slot = tl.where(is_stored, slot, 0)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    source_row = token * (stride_token * SOURCE_VECTOR)
    pages_row = page * (stride_page * PAGES_VECTOR) + offset * (stride_offset * PAGES_VECTOR)
    if CODES == "moved":
        move_rows(
            Source,
            Pages,
            source_row,
            pages_row,
            is_read,
            is_stored,
            chunk,
            stride_head,
            stride_page_head,
            ROW,
            WIDTH,
            SOURCE_VECTOR,
            BLOCK_WIDTH,
        )
    else:
        source_row += chunk * (stride_head * SOURCE_VECTOR)
        pages_row += chunk * (stride_page_head * PAGES_VECTOR)
        scale_at = page * stride_scale_page + offset * stride_scale_offset + chunk * stride_scale_head
        quantize_rows(
            Source, Pages, Scales, source_row, pages_row, scale_at, is_read, is_stored, WIDTH, BLOCK_WIDTH, CODES
        )


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "claims_mask", *STRIDES])
def store_tokens(
    Key,
    Value,
    Key_pages,
    Value_pages,
    Key_scales,
    Value_scales,
    Slots,
    Claims,
    num_tokens: tl.int64,
    num_slots: tl.int64,
    claims_mask: tl.int64,
    stride_key_token: tl.int64,
    stride_key_head: tl.int64,
    stride_key_page: tl.int64,
    stride_key_offset: tl.int64,
    stride_key_page_head: tl.int64,
    stride_key_scale_page: tl.int64,
    stride_key_scale_head: tl.int64,
    stride_key_scale_offset: tl.int64,
    stride_value_token: tl.int64,
    stride_value_head: tl.int64,
    stride_value_page: tl.int64,
    stride_value_offset: tl.int64,
    stride_value_page_head: tl.int64,
    stride_value_scale_page: tl.int64,
    stride_value_scale_head: tl.int64,
    stride_value_scale_offset: tl.int64,
    PAGE_SIZE: tl.constexpr,
    CODES: tl.constexpr,  # "moved": bit for bit; or those of quantize_kernel.py
    KEY_ROW: tl.constexpr,  # vectors of a head, or of all where they are one run
    KEY_WIDTH: tl.constexpr,  # vectors of a token; elements of a head that is quantised
    KEY_CHUNKS: tl.constexpr,
    KEY_VECTOR: tl.constexpr,  # lanes or elements of a vector: what strides are counted in
    KEY_PAGES_VECTOR: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr,
    VALUE_VECTOR: tl.constexpr,
    VALUE_PAGES_VECTOR: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SCAN: tl.constexpr,  # later tokens that are looked at in one step
    SHARED_SLOTS: tl.constexpr,  # what is done about them: "look ahead", "claim", "set right"
):
    """A program stores one chunk of BLOCK_ROWS tokens, those of keys first; to set shared slots right, all chunks."""
    num_chunks: tl.constexpr = KEY_CHUNKS + VALUE_CHUNKS
    program = tl.program_id(0).to(tl.int64)
    block = program if SHARED_SLOTS == "set right" else program // num_chunks
    first_chunk = program - block if SHARED_SLOTS == "set right" else program % num_chunks
    first = block * BLOCK_ROWS
    token = first + tl.arange(0, BLOCK_ROWS)
    # Tokens are read whether they are stored or not.
    is_read = token < num_tokens
    slot = tl.load(Slots + token, mask=is_read, other=-1)
    is_stored = (slot >= 0) & (slot < num_slots)
    num_steps = 1
    if SHARED_SLOTS == "look ahead":
        is_stored = is_stored & is_last(Slots, slot, first, num_tokens, SCAN)
    elif SHARED_SLOTS == "claim":
        tl.store(Claims + (slot & claims_mask), token.to(tl.int32), mask=is_stored & (first_chunk == 0))
    else:
        claimed_by = tl.load(Claims + (slot & claims_mask), mask=is_stored, other=0)
        is_stored = is_stored & (claimed_by != token)
        is_read = is_stored
        num_steps = num_chunks * tl.max(is_stored.to(tl.int32), 0)
        token = last_with(Slots, slot, token, is_stored, num_tokens, SCAN)
    for step in range(num_steps):
        chunk = first_chunk + step
        if chunk < KEY_CHUNKS:
            if KEY_CHUNKS > 0:
                store_rows(
                    Key,
                    Key_pages,
                    Key_scales,
                    token,
                    slot,
                    is_read,
                    is_stored,
                    chunk,
                    stride_key_token,
                    stride_key_head,
                    stride_key_page,
                    stride_key_offset,
                    stride_key_page_head,
                    stride_key_scale_page,
                    stride_key_scale_head,
                    stride_key_scale_offset,
                    PAGE_SIZE,
                    KEY_ROW,
                    KEY_WIDTH,
                    KEY_VECTOR,
                    KEY_PAGES_VECTOR,
                    CODES,
                    KEY_BLOCK,
                )
        elif VALUE_CHUNKS > 0:
            store_rows(
                Value,
                Value_pages,
                Value_scales,
                token,
                slot,
                is_read,
                is_stored,
                chunk - KEY_CHUNKS,
                stride_value_token,
                stride_value_head,
                stride_value_page,
                stride_value_offset,
                stride_value_page_head,
                stride_value_scale_page,
                stride_value_scale_head,
                stride_value_scale_offset,
                PAGE_SIZE,
                VALUE_ROW,
                VALUE_WIDTH,
                VALUE_VECTOR,
                VALUE_PAGES_VECTOR,
                CODES,
                VALUE_BLOCK,
            )
