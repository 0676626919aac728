"""store_kv that quantises on the way in, beside the same rule in torch and the plain copy of the rows it reads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

import pagedkv

from ..case import OURS, Case, CaseSpec, Ceiling, Options, WrongResultError, dtype_label
from ..slot_world import SlotWorld, TokenShape

__all__ = ["cases"]

_NUM_TOKENS = (4096, 32)
_DTYPES = (torch.float32, torch.bfloat16)
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def cases(options: Options) -> Iterator[CaseSpec]:
    """A prompt and a decode step, rows of each dtype into pages of each; quick: each dtype once."""
    pairs = zip(_DTYPES, _LARGEST, strict=True) if options.quick else product(_DTYPES, _LARGEST)
    for (dtype, page_dtype), num_tokens in product(pairs, _NUM_TOKENS[:1] if options.quick else _NUM_TOKENS):
        shape = TokenShape(num_tokens, 8, 128, dtype)
        dtypes = f"{dtype_label(dtype)}-to-{dtype_label(page_dtype)}"
        name = f"T{num_tokens}-Hk8-D128-P16-{options.layout}-{dtypes}"
        yield CaseSpec("store_kv_quantized", name, partial(_build, shape, page_dtype, options.layout))


def _build(shape: TokenShape, page_dtype: torch.dtype, layout: str) -> Case:
    world = SlotWorld(shape, layout, page_dtype)
    pages, offsets = world.slots // 16, world.slots % 16
    rows = world.key, world.value

    def ours(i: int) -> None:
        key_scales, value_scales = world.scales(i)
        pagedkv.store_kv(
            *rows, *world.pages(i), world.slots, key_scales=key_scales, value_scales=value_scales, layout=layout
        )

    def torch_store(i: int) -> None:
        far = world.far_from(i)
        for x, stored, scales in zip(rows, world.in_slot_order(far), world.scales(far), strict=True):
            numbers = x.float()
            scale = numbers.abs().amax(-1) / _LARGEST[page_dtype]
            codes = numbers / scale[..., None]
            codes = codes.round_() if page_dtype == torch.int8 else codes
            stored.index_put_((pages, offsets), codes.to(page_dtype))
            scales.transpose(1, 2).index_put_((pages, offsets), scale)

    def check() -> None:
        ours(0)
        for x, stored, scales in zip(rows, world.in_slot_order(0), world.scales(0), strict=True):
            new = pagedkv.quantize_kv(x, page_dtype, backend="reference")
            codes = stored.view(torch.int8)[pages, offsets]
            if not torch.equal(codes, new.values.view(torch.int8)):
                raise WrongResultError("stored rows differ from the rows quantised by the reference")
            if not torch.equal(scales.transpose(1, 2)[pages, offsets], new.scales):
                raise WrongResultError("stored scales differ from those of the reference")

    contenders = {OURS: ours, "torch + index_put_": torch_store}
    return Case(contenders, check, [Ceiling("copy", shape.num_bytes)])
