"""gather_kv of shuffled slots, beside index_select and the plain copy of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import pagedkv

from ..case import OURS, Case, CaseSpec, Ceiling, Options, WrongResultError, dtype_label
from ..slot_world import SlotWorld, TokenShape

__all__ = ["cases"]

_DTYPES = (torch.float32, torch.bfloat16)


def cases(options: Options) -> Iterator[CaseSpec]:
    """The tokens of a prompt."""
    for dtype in _DTYPES:
        name = f"T4096-Hk8-D128-P16-{options.layout}-{dtype_label(dtype)}"
        yield CaseSpec("gather_kv", name, partial(_build, TokenShape(4096, 8, 128, dtype), options.layout))


def _build(shape: TokenShape, layout: str) -> Case:
    world = SlotWorld(shape, layout)
    pages, offsets = world.slots // 16, world.slots % 16

    def ours(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return pagedkv.gather_kv(*world.pages(i), world.slots, layout=layout)

    def indexed(i: int) -> list[torch.Tensor]:
        far = world.in_slot_order(world.far_from(i))
        if layout == "NHD":
            return [view.flatten(0, 1).index_select(0, world.slots) for view in far]
        return [view[pages, offsets] for view in far]

    def check() -> None:
        pagedkv.store_kv(world.key, world.value, *world.pages(0), world.slots, layout=layout, backend="reference")
        for read, stored in zip(ours(0), (world.key, world.value), strict=True):
            if not torch.equal(read, stored):
                raise WrongResultError("gathered rows differ from the rows stored")

    return Case({OURS: ours, "torch indexing": indexed}, check, [Ceiling("copy", shape.num_bytes)])
