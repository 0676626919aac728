"""Moves between tokens and pages, one slot at a time."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .quantising import codes_and_scale

__all__ = ["copy_pages", "gather_kv", "store_kv"]


def store_kv(key, value, key_pages, value_pages, slot_mapping, key_scales, value_scales):
    """Pages come as [N, P, Hk, D] whatever the layout of the caller, scales as [N, Hk, P] or None."""
    check_slots("slot_mapping", slot_mapping, key_pages)
    tokens = written_tokens(slot_mapping.tolist())
    new = [{token: taken(rows_of(tensor)[token]) for token, _ in tokens} for tensor in (key, value)]
    for rows, pages, scales in zip(new, (key_pages, value_pages), (key_scales, value_scales), strict=True):
        for token, slot in tokens:
            page, offset = divmod(slot, pages.shape[1])
            if scales is None:
                pages.numpy()[page, offset] = rows[token]
            else:
                for head, row in enumerate(rows[token]):
                    codes, scale = codes_and_scale(row)
                    pages.numpy()[page, offset, head] = codes
                    scales.numpy()[page, head, offset] = scale


def gather_kv(key_pages, value_pages, slots, key, value):
    """Fills key and value."""
    check_slots("slots", slots, key_pages)
    for out, pages in ((key.numpy(), key_pages.numpy()), (value.numpy(), value_pages.numpy())):
        for token, slot in enumerate(slots.tolist()):
            out[token] = 0 if is_skipped(slot) else pages[divmod(slot, pages.shape[1])]


def copy_pages(src_pages, dst_pages, src, dst):
    """All pages are read before the first is written."""
    sources, targets = src.tolist(), dst.tolist()
    for name, ids, pages in (("src", sources, src_pages), ("dst", targets, dst_pages)):
        for page in ids:
            if not 0 <= page < len(pages):
                raise ValueError(f"{name} must be in [0, {len(pages)}), got {page}.")
    again = {page for page, times in Counter(targets).items() if times > 1}
    if is_one_tensor(src_pages, dst_pages):
        again |= set(sources) & set(targets)
    if again:
        raise ValueError(f"dst must name pages that no other entry names, got {sorted(again)}.")
    read = np.stack([src_pages.numpy()[page] for page in sources]) if sources else ()
    for page, elements in zip(targets, read, strict=True):
        dst_pages.numpy()[page] = elements


def check_slots(name, slots, pages):
    num_slots = pages.shape[0] * pages.shape[1]
    for slot in slots.tolist():
        if slot >= num_slots:
            raise ValueError(f"{name} must be below {num_slots}, got {slot}.")


def is_skipped(slot):
    return slot < 0


def written_tokens(slots):
    """(token, slot) of the tokens that are written: of each slot the last."""
    return [(token, slot) for slot, token in {slot: i for i, slot in enumerate(slots) if not is_skipped(slot)}.items()]


def rows_of(tokens):
    """[T, Hk, D] by the strides of the caller."""
    return tokens.numpy()


def taken(row):
    """A copy: what is stored may lie in the pages."""
    return row.copy()


def is_one_tensor(src_pages, dst_pages):
    return src_pages.data_ptr() == dst_pages.data_ptr() and src_pages.stride() == dst_pages.stride()
