"""rope_store_kv on a GPU: queries, keys and values in one launch, of many tokens in two."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..pages import check_slots, mark_written
from ..rope import RotaryEmbedding
from . import runtime, shared_slots
from .move_kernel import apart_from
from .quantize_kernel import codes_of
from .rope import RopeTile, heads_of_program, rope_tile, turns_of_pairs
from .rope_store_kv_kernel import CLAIMS, LOOKS_AHEAD, SETS_RIGHT, STRIDES, rope_store_tokens
from .variant import Variant

__all__ = ["compile_variants", "rope_store_kv"]

# Pairs of tokens that a program compares in one step. Interpreted, it costs by its steps, not by their size.
_COMPARED = 2**17 if runtime.IS_INTERPRETED else 2048
_HOW = {LOOKS_AHEAD.value: "looks-ahead", CLAIMS.value: "claims", SETS_RIGHT.value: "sets-right"}


def rope_store_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    rope: RotaryEmbedding,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Pages in NHD order, scales [N, Hk, P]; fills out; everything but the slots is checked, and those by request.

    A slot beyond the pool is skipped where it is not refused.
    """
    num_slots = key_pages.shape[0] * key_pages.shape[1]
    if runtime.checks_bounds():
        check_slots("slot_mapping", slot_mapping, num_slots)
    (num_tokens, num_q_heads, head_dim), num_kv_heads = query.shape, key.shape[1]
    if not num_tokens or not (num_q_heads or num_kv_heads):
        return
    written = [key_pages, value_pages]
    if key_scales is not None and value_scales is not None:
        written += [key_scales, value_scales]
    query, key, value = (apart_from(tokens, written) for tokens in (query, key, value))
    tile = _tile(rope, head_dim, num_tokens, key_scales is not None)
    has_e4m3 = runtime.has_e4m3(runtime.target_of(key_pages.device))
    constexprs = _constexprs(tile, value.shape[2], key_pages, key_scales is not None, has_e4m3)
    looks_ahead = shared_slots.looks_ahead(num_tokens)
    num_claims = 1 if looks_ahead else shared_slots.num_claims(num_slots)
    claims = torch.empty(num_claims, dtype=torch.int32, device=key_pages.device)
    pages = (_codes(key_pages), _codes(value_pages)) if key_scales is not None else (key_pages, value_pages)
    slots, turns = slot_mapping.contiguous(), turns_of_pairs(rope, key_pages.device)
    tensors = query, key, value, positions.contiguous(), turns, *pages, key_scales, value_scales, slots, claims, out
    strides = _strides(query, key, value, key_pages, value_pages, key_scales, value_scales)

    def launch(how: int, num_q_heads: int) -> None:
        num_tiles = -(-num_tokens // tile.BLOCK_TOKENS)
        num_heads = num_q_heads + 2 * num_kv_heads
        heads = heads_of_program(num_tiles, num_heads, key_pages.device)
        numbers = num_tokens, num_slots, num_claims - 1, num_q_heads, num_kv_heads, heads
        rope_store_tokens[(num_tiles * -(-num_heads // heads),)](
            *tensors,
            *numbers,
            *strides,
            **constexprs,
            SHARED_SLOTS=how,
            num_warps=tile.num_warps,
        )

    with runtime.on_device(key_pages):
        if looks_ahead:
            launch(LOOKS_AHEAD.value, num_q_heads)
        else:
            launch(CLAIMS.value, num_q_heads)
            if num_kv_heads:
                launch(SETS_RIGHT.value, 0)
    mark_written(*written)


def _codes(pages: torch.Tensor) -> torch.Tensor:
    return pages if pages.dtype == torch.int8 else pages.view(torch.uint8)


def _strides(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> tuple[int, ...]:
    """In elements, in the order of STRIDES."""
    strides = query.stride()[:2]
    for tokens, pages in ((key, key_pages), (value, value_pages)):
        strides += tokens.stride()[:2] + pages.stride()[:3]
    for scales in (key_scales, value_scales):
        strides += (0, 0, 0) if scales is None else (scales.stride(0), scales.stride(2), scales.stride(1))
    return strides


def _tile(rope: RotaryEmbedding, head_dim: int, num_tokens: int, has_scales: bool) -> RopeTile:
    tile = rope_tile(rope, head_dim, num_tokens)
    if not has_scales or not tile.BLOCK_REST:
        return tile
    # Pairs and the rest are joined to be quantised: as many columns of each.
    width = max(2 * tile.BLOCK_HALF, tile.BLOCK_REST)
    return tile._replace(BLOCK_HALF=width // 2, BLOCK_REST=width)


def _constexprs(
    tile: RopeTile, value_dim: int, pages: torch.Tensor, has_scales: bool, has_e4m3: bool
) -> dict[str, Any]:
    return {
        **tile._asdict(),
        "VALUE_DIM": value_dim,
        "BLOCK_VALUE": triton.next_power_of_2(max(value_dim, 1)),
        "PAGE_SIZE": pages.shape[1],
        "CODES": codes_of(pages.dtype, has_e4m3) if has_scales else 0,
        "SCAN": max(min(_COMPARED // tile.BLOCK_TOKENS, 512), 1),
    }


def compile_variants() -> list[Variant]:
    """Decode and prefill, both pairings, columns that stay, each kind of codes, and each way with shared slots."""
    llama, partial, interleaved = RotaryEmbedding(128), RotaryEmbedding(32), RotaryEmbedding(64, interleaved=True)
    cases: list[tuple[str, str, RotaryEmbedding, int, int, tl.constexpr]] = [
        ("bf16", "bf16", llama, 128, 64, LOOKS_AHEAD),
        ("fp16", "fp16", llama, 128, 1, LOOKS_AHEAD),
        ("bf16", "bf16", llama, 128, 5000, CLAIMS),
        ("bf16", "bf16", llama, 128, 5000, SETS_RIGHT),
        ("fp32", "fp32", interleaved, 80, 64, LOOKS_AHEAD),
        ("bf16", "int8", llama, 128, 5000, CLAIMS),
        ("bf16", "e4m3", llama, 128, 64, LOOKS_AHEAD),
        ("bf16", "native-e4m3", llama, 128, 5000, CLAIMS),
        ("fp16", "native-e4m3", partial, 128, 5000, SETS_RIGHT),
        ("fp32", "int8", RotaryEmbedding(512, interleaved=True), 576, 64, LOOKS_AHEAD),
    ]
    return [_variant(*case) for case in cases]


def _variant(tokens: str, pages: str, rope: RotaryEmbedding, dim: int, num_tokens: int, how: tl.constexpr) -> Variant:
    has_scales, is_native = tokens != pages, pages.startswith("native")
    codes = torch.int8 if pages == "int8" else torch.float8_e4m3fn
    some_pages = torch.empty(8, 16, 8, dim, dtype=codes, device="meta")
    tile = _tile(rope, dim, num_tokens, has_scales)
    constexprs = {**_constexprs(tile, dim, some_pages, has_scales, is_native), "SHARED_SLOTS": how.value}
    page_pointer = f"*{'i8' if pages == 'int8' else 'u8' if has_scales else tokens}"
    signature = dict.fromkeys(("Query", "Key", "Value", "Out"), f"*{tokens}")
    signature |= dict.fromkeys(("Key_pages", "Value_pages"), page_pointer)
    signature |= {"Positions": "*i64", "Turns": "*i64", "Slots": "*i64", "Claims": "*i32"}
    scales = ("Key_scales", "Value_scales")
    if has_scales:
        signature |= dict.fromkeys(scales, "*fp32")
    else:
        constexprs |= dict.fromkeys(scales)
    aligned = frozenset((*signature, *(STRIDES if dim % 16 == 0 else ())))
    signature |= dict.fromkeys(("num_tokens", "num_q_heads", "num_kv_heads", "heads_of_program"), "i32")
    signature |= dict.fromkeys(("num_slots", "claims_mask", *STRIDES), "i64")
    return Variant(
        f"rope_store_kv-{tokens}-to-{pages}-{rope.dim}-of-{dim}-T{num_tokens}-{_HOW[how.value]}",
        rope_store_tokens,
        signature,
        constexprs,
        aligned,
        tile.num_warps,
        left_out={"cuda:80": "it has no float8_e4m3fn", "hip:gfx942": "it gets the bits"} if is_native else {},
    )
