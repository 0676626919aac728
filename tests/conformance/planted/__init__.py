"""Defects planted in the reference: name, op, what runs in its place, and the situation that must find it."""

from __future__ import annotations

from . import attention, latents, moves, numbers

__all__ = ["PLANTED"]

PLANTED = {
    **{f"store_kv: {name}": ("store_kv", *defect) for name, defect in moves.STORE.items()},
    **{f"gather_kv: {name}": ("gather_kv", *defect) for name, defect in moves.GATHER.items()},
    **{f"copy_pages: {name}": ("copy_pages", *defect) for name, defect in moves.COPY.items()},
    **{f"quantize_kv: {name}": ("quantize_kv", *defect) for name, defect in numbers.QUANTIZE.items()},
    **{f"apply_rope: {name}": ("apply_rope", *defect) for name, defect in numbers.ROPE.items()},
    **{f"rope_store_kv: {name}": ("rope_store_kv", *defect) for name, defect in numbers.ROPE_STORE.items()},
    **{f"merge_states: {name}": ("merge_states", *defect) for name, defect in numbers.MERGE.items()},
    **{f"paged_attention: {name}": ("paged_attention", *defect) for name, defect in attention.ATTENTION.items()},
    **{f"mla_attention: {name}": ("mla_attention", *defect) for name, defect in latents.MLA.items()},
}
