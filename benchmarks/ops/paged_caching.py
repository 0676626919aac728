"""InfiniOP's paged_caching into shuffled slots of its pools, beside index_put_ and the plain copy of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from pagedkv.integrations import infiniop

from ..case import OURS, Case, CaseSpec, Ceiling, Options, WrongResultError, dtype_label
from ..paged_kv import PAGE_SIZE
from ..slot_world import SlotWorld, TokenShape

__all__ = ["cases"]

_NUM_TOKENS = 4096
_DTYPES = (torch.float32, torch.bfloat16)
_LAYOUT = "HND"  # the operator's own, whatever the command line says


def cases(options: Options) -> Iterator[CaseSpec]:
    """A prompt."""
    for dtype in _DTYPES:
        shape = TokenShape(_NUM_TOKENS, 8, 128, dtype)
        name = f"T{_NUM_TOKENS}-Hk8-D128-P{PAGE_SIZE}-{_LAYOUT}-{dtype_label(dtype)}"
        yield CaseSpec("paged_caching", name, partial(_build, shape))


def _build(shape: TokenShape) -> Case:
    world = SlotWorld(shape, _LAYOUT)
    blocks, offsets = world.slots // PAGE_SIZE, world.slots % PAGE_SIZE
    new = world.key, world.value, world.slots
    descriptor = infiniop.PagedCachingDescriptor.create(infiniop.Handle(), *world.pages(0), *new)

    def calculate(i: int) -> None:
        descriptor.calculate(None, *world.pages(i), *new)

    def index_put(i: int) -> None:
        k_cache, v_cache = world.in_slot_order(world.far_from(i))
        k_cache.index_put_((blocks, offsets), world.key)
        v_cache.index_put_((blocks, offsets), world.value)

    def check() -> None:
        calculate(0)
        for stored, rows in zip(world.in_slot_order(0), (world.key, world.value), strict=True):
            if not torch.equal(stored[blocks, offsets], rows):
                raise WrongResultError("stored rows differ from the rows given")

    return Case({OURS: calculate, "index_put_": index_put}, check, [Ceiling("copy", shape.num_bytes)])
