"""store_kv into shuffled slots, beside index_put_ and the plain copy of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import pagedkv

from ..case import OURS, Case, CaseSpec, Ceiling, Options, WrongResultError, dtype_label
from ..slot_world import SlotWorld, TokenShape

__all__ = ["cases"]

_NUM_TOKENS = (4096, 32)
_DTYPES = (torch.float32, torch.bfloat16)


def cases(options: Options) -> Iterator[CaseSpec]:
    """A prompt and a decode step."""
    for num_tokens in _NUM_TOKENS[:1] if options.quick else _NUM_TOKENS:
        for dtype in _DTYPES:
            shape = TokenShape(num_tokens, 8, 128, dtype)
            name = f"T{num_tokens}-Hk8-D128-P16-{options.layout}-{dtype_label(dtype)}"
            yield CaseSpec("store_kv", name, partial(_build, shape, options.layout))


def _build(shape: TokenShape, layout: str) -> Case:
    world = SlotWorld(shape, layout)
    pages, offsets = world.slots // 16, world.slots % 16

    def ours(i: int) -> None:
        pagedkv.store_kv(world.key, world.value, *world.pages(i), world.slots, layout=layout)

    def index_put(i: int) -> None:
        key_pages, value_pages = world.in_slot_order(world.far_from(i))
        key_pages.index_put_((pages, offsets), world.key)
        value_pages.index_put_((pages, offsets), world.value)

    def check() -> None:
        ours(0)
        for stored, new in zip(world.in_slot_order(0), (world.key, world.value), strict=True):
            if not torch.equal(stored[pages, offsets], new):
                raise WrongResultError("stored rows differ from the rows given")

    return Case({OURS: ours, "index_put_": index_put}, check, [Ceiling("copy", shape.num_bytes)])
