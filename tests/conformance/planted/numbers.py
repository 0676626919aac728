"""Defects of quantising, rotating and merging."""

from __future__ import annotations

import math

import torch

import pagedkv
from pagedkv.kernels import reference

__all__ = ["MERGE", "QUANTIZE", "ROPE", "ROPE_STORE"]


def quantised(change):
    def quantize(x, values, scales):
        reference.quantize_kv(x, values, scales)
        change(values.view(torch.uint8), scales)

    return quantize


def multiplies_by_the_reciprocal(x, values, scales):
    reference.quantize_kv(x, values, scales)
    if values.dtype == torch.int8:
        values.copy_((x.float() * (1 / scales)[..., None]).nan_to_num(0.0).round())
        scales.copy_(torch.where(scales.isfinite(), x.float().abs().amax(-1) * (1 / 127), scales))


QUANTIZE = {
    "columns beyond 64 are zero": (quantised(lambda codes, scales: codes[..., 64:].zero_()), "width-128-to-int8"),
    "columns beyond 512 are zero": (
        quantised(lambda codes, scales: codes[..., 512:].zero_()),
        "width-576-to-float8_e4m3fn",
    ),
    "rows beyond 65535 are zero": (quantised(lambda codes, scales: codes[65535:].zero_()), "many-tokens-to-int8"),
    "heads beyond 32 have no scale": (quantised(lambda codes, scales: scales[:, 32:].zero_()), "40-heads-to-int8"),
    "-0.0 is lost": (
        quantised(lambda codes, scales: codes.masked_fill_(codes == 0x80, 0)),
        "zero-rows-to-float8_e4m3fn",
    ),
    "a scale is a product with 1 / 127": (multiplies_by_the_reciprocal, "200-tokens-to-int8"),
}


def rotated(change):
    def rotate(x, positions, rope, out):
        reference.apply_rope(x, positions, rope, out)
        change(out, x)

    return rotate


def rotates_backwards_before_the_start(x, positions, rope, out):
    reference.apply_rope(x, positions.abs(), rope, out)


def forgets_the_columns_beyond(x, positions, rope, out):
    reference.apply_rope(x, positions, rope, out)
    out[..., rope.dim :] = 0


def pairs_neighbours_always(x, positions, rope, out):
    neighbours = pagedkv.RotaryEmbedding(rope.dim, rope.theta, rope.scale, True, rope.llama31)
    reference.apply_rope(x, positions, neighbours, out)


def cut_to(out, exact):
    """Cut off, not rounded, to 16 bits: of bfloat16 the upper half of a float32."""
    if out.dtype == torch.bfloat16:
        upper = exact.float().contiguous().view(torch.int32) >> 16
        out.copy_(upper.to(torch.int16).view(torch.bfloat16))


def cuts_off_rotated(x, positions, rope, out):
    exact = torch.empty(out.shape)
    reference.apply_rope(x.float(), positions, rope, exact)
    out.copy_(exact)
    cut_to(out, exact)


ROPE = {
    "the sine before the start": (rotates_backwards_before_the_start, "half"),
    "columns beyond rope.dim are zero": (forgets_the_columns_beyond, "partial"),
    "pairs are neighbours always": (pairs_neighbours_always, "llama31"),
    "heads beyond 32 are not turned": (rotated(lambda out, x: out[:, 32:].copy_(x[:, 32:])), "40-heads"),
    "rows beyond 128 are not turned": (rotated(lambda out, x: out[128:].copy_(x[128:])), "200-rows"),
    "bfloat16 is cut, not rounded": (cuts_off_rotated, "bfloat16"),
}


def turned_and_stored(change):
    """The arguments of the reference are changed; the last is the result."""

    def run(*arguments):
        named = dict(zip(ROPE_STORE_ARGUMENTS, arguments, strict=True))
        reference.rope_store_kv(**{**named, **change(named)})

    return run


ROPE_STORE_ARGUMENTS = (
    *("query", "key", "value", "positions", "rope", "key_pages", "value_pages", "slot_mapping"),
    *("key_scales", "value_scales", "out"),
)


def stores_the_key_as_it_is(query, key, value, positions, rope, key_pages, value_pages, slots, *scales_and_out):
    *scales, out = scales_and_out
    reference.apply_rope(query, positions, rope, out)
    reference.store_kv(key, value, key_pages, value_pages, slots, *scales)


def turns_only_what_it_stores(query, key, value, positions, rope, key_pages, value_pages, slots, *scales_and_out):
    reference.rope_store_kv(query, key, value, positions, rope, key_pages, value_pages, slots, *scales_and_out)
    out = scales_and_out[-1]
    out[slots < 0] = query[slots < 0]


def quantizes_the_key_before_it_is_rounded(
    query, key, value, positions, rope, key_pages, value_pages, slots, *scales_and_out
):
    *scales, out = scales_and_out
    reference.apply_rope(query, positions, rope, out)
    turned = torch.empty(key.shape, dtype=torch.float32)
    reference.apply_rope(key.float(), positions, rope, turned)
    if scales[0] is None:
        turned = turned.to(key.dtype)
    reference.store_kv(turned, value, key_pages, value_pages, slots, *scales)


def writes_before_it_refuses(query, key, value, positions, rope, key_pages, value_pages, slots, *scales_and_out):
    reference.apply_rope(query, positions, rope, scales_and_out[-1])
    reference.rope_store_kv(query, key, value, positions, rope, key_pages, value_pages, slots, *scales_and_out)


def lets_the_first_duplicate_win(query, key, value, positions, rope, key_pages, value_pages, slots, *scales_and_out):
    *scales, out = scales_and_out
    reference.apply_rope(query, positions, rope, out)
    flipped = (t.flip(0) for t in (query, key, value, positions))
    pages = key_pages, value_pages
    reference.rope_store_kv(*flipped, rope, *pages, slots.flip(0), *scales, torch.empty_like(out))


def first_heads(named):
    heads = {name: named[name][:, :32] for name in ("key", "value")}
    return {**heads, **{name: named[name][:, :, :32] for name in ("key_pages", "value_pages")}}


ROPE_STORE = {
    "keys are stored unturned": (stores_the_key_as_it_is, "half"),
    "queries of skipped slots are not turned": (turns_only_what_it_stores, "slots-negative"),
    "keys are quantised before they are rounded": (quantizes_the_key_before_it_is_rounded, "int8-of-bfloat16"),
    "the result is written before a slot is refused": (writes_before_it_refuses, "refuses-a-slot-beyond"),
    "positions are slots": (turned_and_stored(lambda named: {"positions": named["slot_mapping"]}), "slots-shuffled"),
    "pairs are halves always": (
        turned_and_stored(lambda named: {"rope": pagedkv.RotaryEmbedding(named["rope"].dim)}),
        "interleaved",
    ),
    "the first duplicate wins": (lets_the_first_duplicate_win, "slots-duplicates"),
    "KV heads beyond 32 are not stored": (turned_and_stored(first_heads), "heads-40-40-widths-64-64"),
}


def merged(change):
    def merge(values, lse, out, out_lse):
        reference.merge_states(values, lse, out, out_lse)
        change(out, out_lse)

    return merge


def first_states(values, lse, out, out_lse):
    reference.merge_states(values[:, :64], lse[:, :64], out, out_lse)


def cuts_off_merged(values, lse, out, out_lse):
    exact = torch.empty(out.shape)
    reference.merge_states(values.float(), lse, exact, out_lse)
    out.copy_(exact)
    cut_to(out, exact)


MERGE = {
    "states beyond 64 are lost": (first_states, "last-state-alone-saw-keys"),
    "states beyond 64 are lost in 16 bits": (first_states, "many-states-bfloat16"),
    "tokens beyond 64 are zero": (merged(lambda out, lse: out[64:].zero_()), "200-tokens"),
    "tokens beyond 65535 are zero": (merged(lambda out, lse: out[65535:].zero_()), "many-tokens"),
    "heads beyond 32 are zero": (merged(lambda out, lse: out[:, 32:].zero_()), "40-heads"),
    "columns beyond 128 are zero": (merged(lambda out, lse: out[..., 128:].zero_()), "width-256"),
    "LSE in base 2": (merged(lambda out, lse: lse.div_(math.log(2))), "float32"),
    "bfloat16 is cut, not rounded": (cuts_off_merged, "bfloat16"),
}
