"""copy_pages over all layers of a pool in both orders, beside torch indexing and the plain copy of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import pagedkv

from ..case import OURS, Case, CaseSpec, Ceiling, Options, WrongResultError

__all__ = ["cases"]

_POOL_BYTES, _COPIED_BYTES = 512 << 20, 16 << 20


def cases(options: Options) -> Iterator[CaseSpec]:
    """Pools of a small and of a common geometry."""
    for num_layers, heads, dim in ((30, 3, 64), (8, 8, 128))[: 1 if options.quick else 2]:
        for order in ("layer_first", "page_first"):
            spec = pagedkv.KVCacheSpec(num_layers, heads, dim, dtype=torch.bfloat16, layout=options.layout, order=order)
            yield CaseSpec("copy_pages", f"L{num_layers}-Hk{heads}-D{dim}-P16-{order}-bf16", partial(_build, spec))


def _build(spec: pagedkv.KVCacheSpec) -> Case:
    pool = pagedkv.KVPool(spec, _POOL_BYTES // spec.bytes_per_page)
    pool.buffer.copy_(torch.arange(pool.buffer.numel()) % 251)
    num_copied = _COPIED_BYTES // spec.bytes_per_page
    ids = torch.randperm(pool.num_pages)
    num_parts = pool.num_pages // (2 * num_copied)
    parts = ids[: num_parts * 2 * num_copied].view(num_parts, 2, num_copied)
    layers = [pages for layer in range(spec.num_layers) for pages in (pool.key_pages(layer), pool.value_pages(layer))]

    def ours(i: int) -> None:
        pool.copy_pages(*parts[i % num_parts])

    def indexed(i: int) -> None:
        src, dst = parts[(i + num_parts // 2) % num_parts]
        for pages in layers:
            pages[dst] = pages[src]

    def check() -> None:
        before = [pages[parts[0, 0]].clone() for pages in layers]
        ours(0)
        if not all(torch.equal(pages[parts[0, 1]], old) for pages, old in zip(layers, before, strict=True)):
            raise WrongResultError("copied pages differ from their sources")

    return Case({OURS: ours, "torch indexing": indexed}, check, [Ceiling("copy", num_copied * spec.bytes_per_page)])
