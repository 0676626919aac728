"""gather_kv on a GPU: keys and values in one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..pages import check_slots
from .move_kernel import Form, Launch, lane_tensor, lanes_a_vector, move_rows, tile_of, vector_bytes
from .runtime import checks_bounds, num_multiprocessors
from .variant import Variant

__all__ = ["compile_variants", "gather_kv"]


def gather_kv(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Pages in NHD order; fills key and value; everything but the slots is checked, and they where that is asked for.

    A slot beyond the pool that is not refused gives zeros.
    """
    if checks_bounds():
        check_slots("slots", slots, key_pages.shape[0] * key_pages.shape[1])
    if key.numel() or value.numel():
        pairs = (key_pages, key), (value_pages, value)
        _launch(pairs, slots.contiguous(), num_multiprocessors(slots.device)).run(key_pages)


def _launch(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], slots: torch.Tensor, num_multiprocessors: int
) -> Launch:
    """Of keys, then of values: the pages, and the tensor that is filled."""
    forms = tuple((Form.of(pages), Form.of(out)) for pages, out in pairs)
    plan = _plan(forms, slots.shape[0], num_multiprocessors)
    tensors: dict[str, Any] = {"Slots": slots}
    for side, (pages, out) in zip(("Key", "Value"), pairs, strict=True):
        tensors[side] = lane_tensor(out, plan.vector_bytes)
        tensors[f"{side}_pages"] = lane_tensor(pages, plan.vector_bytes)
    return Launch(_gather_tokens, plan.num_programs, tensors, plan.numbers, plan.constexprs)


class _Plan(NamedTuple):
    """A launch but for its tensors."""

    vector_bytes: int
    num_programs: int
    numbers: dict[str, int]
    constexprs: dict[str, int]


@functools.lru_cache(maxsize=4096)
def _plan(forms: tuple[tuple[Form, Form], ...], num_tokens: int, num_multiprocessors: int) -> _Plan:
    num_pages, page_size, num_heads, _ = forms[0][0].shape
    num_bytes = vector_bytes(*(form for pair in forms for form in pair if pair[1].shape.numel()))
    widths = [out.shape[1:].numel() * out.element_size // num_bytes for _, out in forms]
    tile = tile_of(num_tokens, widths, num_bytes, num_multiprocessors)
    numbers = {"num_tokens": num_tokens, "num_slots": num_pages * page_size}
    constexprs = {"PAGE_SIZE": page_size, "LANES": lanes_a_vector(num_bytes), "BLOCK_ROWS": tile.rows}
    num_chunks = 0
    for side, (pages, out), width, block in zip(("key", "value"), forms, widths, tile.vectors, strict=True):
        strides = zip(("page", "offset", "head"), pages.strides_in_vectors(num_bytes), strict=True)
        numbers |= {f"stride_{side}_{name}": stride for name, stride in strides}
        # Heads that lie end to end are one run.
        is_one_run = num_heads == 1 or pages.strides[2] == out.shape[2]
        row, chunks = width if is_one_run else width // num_heads, triton.cdiv(width, block)
        of_side = {"ROW": row, "WIDTH": width, "CHUNKS": chunks, "BLOCK": block}
        constexprs |= {f"{side.upper()}_{name}": number for name, number in of_side.items()}
        num_chunks += chunks
    return _Plan(num_bytes, triton.cdiv(num_tokens, tile.rows) * num_chunks, numbers, constexprs)


_STRIDES = [f"stride_{side}_{of}" for side in ("key", "value") for of in ("page", "offset", "head")]


@triton.jit(do_not_specialize=["num_tokens", "num_slots", *_STRIDES])
def _gather_tokens(
    Key,
    Value,
    Key_pages,
    Value_pages,
    Slots,
    num_tokens: tl.int64,
    num_slots: tl.int64,
    stride_key_page: tl.int64,  # in vectors, as all strides
    stride_key_offset: tl.int64,
    stride_key_head: tl.int64,
    stride_value_page: tl.int64,
    stride_value_offset: tl.int64,
    stride_value_head: tl.int64,
    PAGE_SIZE: tl.constexpr,
    KEY_ROW: tl.constexpr,  # vectors of a head, or of all where they are one run
    KEY_WIDTH: tl.constexpr,  # vectors of a token
    KEY_CHUNKS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """A program reads one chunk of BLOCK_ROWS tokens; the chunks of the keys come before those of the values."""
    num_chunks: tl.constexpr = KEY_CHUNKS + VALUE_CHUNKS
    program = tl.program_id(0).to(tl.int64)
    chunk = program % num_chunks
    token = program // num_chunks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = token < num_tokens
    slot = tl.load(Slots + token, mask=exists, other=-1)
    is_read = (slot >= 0) & (slot < num_slots)
    slot = tl.where(is_read, slot, 0)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    if chunk < KEY_CHUNKS:
        if KEY_CHUNKS > 0:
            move_rows(
                Key_pages,
                Key,
                (page * stride_key_page + offset * stride_key_offset) * LANES,
                token * (KEY_WIDTH * LANES),
                is_read,
                exists,
                chunk,
                stride_key_head,
                KEY_ROW,
                KEY_ROW,
                KEY_WIDTH,
                LANES,
                KEY_BLOCK,
            )
    elif VALUE_CHUNKS > 0:
        move_rows(
            Value_pages,
            Value,
            (page * stride_value_page + offset * stride_value_offset) * LANES,
            token * (VALUE_WIDTH * LANES),
            is_read,
            exists,
            chunk - KEY_CHUNKS,
            stride_value_head,
            VALUE_ROW,
            VALUE_ROW,
            VALUE_WIDTH,
            LANES,
            VALUE_BLOCK,
        )


def compile_variants() -> list[Variant]:
    """Vectors of each width, one run of heads and several."""
    variants = []
    for num_tokens, num_heads, dims, dtype, heads_first in (
        (64, 8, (128, 128), torch.bfloat16, False),
        (16384, 8, (128, 128), torch.bfloat16, True),
        (16384, 1, (512, 64), torch.bfloat16, False),
        (256, 2, (80, 14), torch.float32, True),
        (256, 8, (1, 1), torch.float32, True),
        (256, 2, (81, 13), torch.float16, False),
        (256, 1, (33, 0), torch.int8, False),
    ):
        slots = torch.empty(num_tokens, dtype=torch.int64, device="meta")
        pairs = []
        for dim in dims:
            shape = (1024, num_heads, 16, dim) if heads_first else (1024, 16, num_heads, dim)
            pages = slots.new_empty(shape, dtype=dtype)
            pairs.append((pages.transpose(1, 2) if heads_first else pages, pages.new_empty(num_tokens, num_heads, dim)))
        words = [f"T{num_tokens}", f"H{num_heads}", *map(str, dims), str(dtype)[6:], "HND" if heads_first else "NHD"]
        variants.append(_launch(pairs, slots, 132).variant("-".join(words)))
    return variants
