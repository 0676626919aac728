"""Defects of the three moves."""

from __future__ import annotations

import torch

from pagedkv.kernels import reference

__all__ = ["COPY", "GATHER", "STORE"]

STORES = reference.store_kv


def takes(change):
    """The keys and values that arrive are changed, where they are moved and not quantised."""

    def store(key, value, key_pages, value_pages, slots, key_scales=None, value_scales=None):
        if key_scales is None and key.dtype.is_floating_point and key.dtype.itemsize > 1:
            key, value = change(key), change(value)
        STORES(key, value, key_pages, value_pages, slots, key_scales, value_scales)

    return store


def subnormals_flushed(x):
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, torch.zeros_like(x), x)


def nan_is_one(x):
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x)


def infinity_saturates(x):
    return torch.where(x.isinf(), x.sign() * torch.finfo(x.dtype).max, x)


def negative_zero_lost(x):
    return torch.where(x == 0, torch.zeros_like(x), x)


def chosen_slots(change):
    """Of the slots some are lost or become others, once they are known to be in the pages."""

    def store(key, value, key_pages, value_pages, slots, *scales):
        if not (slots >= key_pages.shape[0] * key_pages.shape[1]).any():
            slots = change(slots)
        STORES(key, value, key_pages, value_pages, slots, *scales)

    return store


def first_heads(key, value, key_pages, value_pages, slots, *scales):
    few = [None if scale is None else scale[:, :32] for scale in scales]
    STORES(key[:, :32], value[:, :32], key_pages[:, :, :32], value_pages[:, :, :32], slots, *few)


def drops_many(key, value, key_pages, value_pages, slots, *scales):
    if len(slots) <= 65535:
        STORES(key, value, key_pages, value_pages, slots, *scales)


def first_columns(key, value, key_pages, value_pages, slots, *scales):
    if key.shape[2] > 128 and not any(scale is not None for scale in scales):
        key, key_pages = key[..., :128], key_pages[..., :128]
    STORES(key, value, key_pages, value_pages, slots, *scales)


def float8_of_16_bits(key, value, key_pages, value_pages, slots, key_scales=None, value_scales=None):
    STORES(key, value, key_pages, value_pages, slots, key_scales, value_scales)
    if key_scales is not None and key_pages.dtype == torch.float8_e4m3fn and key.dtype == torch.float16:
        key_scales.mul_(2)


def writes_then_checks(key, value, key_pages, value_pages, slots, *scales):
    if (slots >= key_pages.shape[0] * key_pages.shape[1]).any():
        key_pages[0, 0, 0, 0] = 1
    STORES(key, value, key_pages, value_pages, slots, *scales)


def checks_the_first(key, value, key_pages, value_pages, slots, *scales):
    slots = slots.clone()
    slots[64:][slots[64:] >= key_pages.shape[0] * key_pages.shape[1]] = -1
    STORES(key, value, key_pages, value_pages, slots, *scales)


def int16(slots):
    return torch.where(slots < 0, slots, slots % 65536)


STORE = {
    "subnormals are flushed": (takes(subnormals_flushed), "slots-shuffled"),
    "NaN codes are flushed": (takes(nan_is_one), "slots-shuffled"),
    "infinity saturates": (takes(infinity_saturates), "float16"),
    "-0.0 is lost": (takes(negative_zero_lost), "bfloat16"),
    "float16 is clamped": (takes(lambda x: x.clamp(-1000, 1000) if x.dtype == torch.float16 else x), "float16"),
    "heads beyond 32 are lost": (first_heads, "heads-40-widths-128-128-float32"),
    "heads beyond 32 of codes are lost": (first_heads, "codes-int8-40-heads"),
    "columns beyond 128 are lost": (first_columns, "heads-2-widths-192-128-float16"),
    "nothing of more than 65535 tokens": (drops_many, "many-tokens"),
    "nothing of more than 65535 quantised tokens": (drops_many, "codes-float8_e4m3fn-many-tokens"),
    "slots are cut to 16 bits": (chosen_slots(int16), "many-pages"),
    "tokens beyond 1024 are lost": (
        chosen_slots(lambda slots: torch.where(torch.arange(len(slots)) < 1024, slots, -1)),
        "many-tokens",
    ),
    "the last odd token is skipped": (
        chosen_slots(lambda slots: torch.where(torch.arange(len(slots)) < len(slots) // 2 * 2, slots, -1)),
        "slots-one",
    ),
    "float8 codes of float16 have other scales": (float8_of_16_bits, "codes-float8_e4m3fn-of-float16"),
    "a refusal comes after a write": (writes_then_checks, "refuses-a-slot-beyond"),
    "slots are checked in the first block": (checks_the_first, "refuses-a-slot-beyond-near-the-end"),
}


def gathered(change):
    def gather(key_pages, value_pages, slots, key, value):
        reference.gather_kv(key_pages, value_pages, slots, key, value)
        change(key, value)

    return gather


def answers_beyond(key_pages, value_pages, slots, key, value):
    slots = slots.clamp(max=key_pages.shape[0] * key_pages.shape[1] - 1)
    reference.gather_kv(key_pages, value_pages, slots, key, value)


GATHER = {
    "rows beyond 64 are zero": (gathered(lambda key, value: key[64:].zero_()), "slots-200"),
    "rows beyond 65535 are zero": (gathered(lambda key, value: value[65535:].zero_()), "slots-many"),
    "heads beyond 32 are zero": (
        gathered(lambda key, value: key[:, 32:].zero_()),
        "heads-40-widths-128-128-bfloat16",
    ),
    "columns beyond 128 are zero": (
        gathered(lambda key, value: key[..., 128:].zero_()),
        "heads-3-widths-256-256-float16",
    ),
    "-0.0 is lost": (gathered(lambda key, value: key.masked_fill_(key == 0, 0)), "float16"),
    "a slot beyond is answered": (answers_beyond, "refuses-a-slot-beyond"),
}


def copies(change):
    def copy(src_pages, dst_pages, src, dst):
        reference.copy_pages(src_pages, dst_pages, *change(src, dst))

    return copy


def copies_the_even_bytes(src_pages, dst_pages, src, dst):
    width = src_pages.shape[-1]
    if width % 2 and src_pages.dim() > 2:
        src_pages, dst_pages = src_pages[..., : width - 1], dst_pages[..., : width - 1]
    reference.copy_pages(src_pages, dst_pages, src, dst)


def finds_neighbours_alone(src_pages, dst_pages, src, dst):
    last = len(dst) - 1
    if last > 32 and int(dst[0]) == int(dst[last]):
        src, dst = src[:last], dst[:last]
    reference.copy_pages(src_pages, dst_pages, src, dst)


COPY = {
    "pages beyond 32 are not copied": (copies(lambda src, dst: (src[:32], dst[:32])), "100-pages"),
    "page ids are cut to 16 bits": (copies(lambda src, dst: (src % 65536, dst)), "100-of-many-pages"),
    "the odd end of a page is lost": (copies_the_even_bytes, "pages-of-an-odd-width-int8"),
    "a target twice is found beside itself alone": (finds_neighbours_alone, "refuses-a-target-twice-far-apart"),
}
