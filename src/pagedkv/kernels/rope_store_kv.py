"""Turns new queries and keys by their positions and writes keys and values into their slots, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..shapes import Shapes, check_device, check_dtype, check_floating, check_last_dim_contiguous
from .attention_checks import check_contiguous, check_no_overlap
from .backend import OpCall, select
from .pages import between_graphs, check_no_grad, fits_graph, to_nhd
from .rope import RotaryEmbedding, check_rope
from .store_kv import check_store

__all__ = ["rope_store_kv"]

_SCALES = frozenset({"scales"})


def rope_store_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    rope: RotaryEmbedding,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    layout: str = "NHD",
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Returns the queries turned by their positions, and writes the turned keys and the values into their slots.

    `apply_rope(query)`, and `store_kv` of `apply_rope(key)` and value, bit for bit as the same back end gives them; but
    each number is read once and written once, in one launch of a GPU.

    Shapes: query [T, Hq, D], D >= rope.dim; key [T, Hk, D]; value [T, Hk, Dv]; positions, slot_mapping [T] int64;
            key_pages [N, P, Hk, D]; value_pages [N, P, Hk, Dv] ("HND": [N, Hk, P, D] and [N, Hk, P, Dv]).
            Returns [T, Hq, D] in the dtype of query, in `out` (contiguous) when it is given.
            key and value have the dtype of the pages: float32, float16 or bfloat16, as query, which may have another.
            Last dims are contiguous, other strides are free.
    Scales: with key_scales and value_scales [N, Hk, P] float32 the pages are int8 or float8_e4m3fn, key and value
            float32, float16 or bfloat16: the turned key is rounded to its own dtype, then quantised as in `store_kv`.
    Slots:  slot = page * P + offset. A negative slot is skipped: nothing is stored, the query is turned all the same.
            Duplicates: the last one wins.
    When:   after the pages are reserved, before the attention of the same step.
    Owns:   writes only `out`, which must not overlap another argument, and the named slots. Nothing is written if the
            call raises. query, key and value may lie in the pages: they count as they were before the call.
    Raises: ValueError, TypeError for a shape, dtype, device or slot that breaks the lines above, for expanded pages,
            and for a tensor that requires a gradient while gradients are recorded.
    Source: RoFormer (arXiv 2104.09864), section 3.4.2; PagedAttention (arXiv 2309.06180), section 4.3.
            Reference: kernels/reference/rope_store_kv.py.

    >>> key_pages, value_pages = torch.zeros(2, 4, 16, 8, 64)
    >>> query, key, value = torch.ones(3, 32, 64), torch.ones(3, 8, 64), torch.ones(3, 8, 64)
    >>> positions, slots = torch.tensor([5, 6, 0]), torch.tensor([5, 6, 16])
    >>> turned = rope_store_kv(query, key, value, positions, RotaryEmbedding(64), key_pages, value_pages, slots)
    >>> torch.equal(turned[0, 0], key_pages[0, 5, 0]), torch.equal(turned[2], query[2])
    (True, True)
    """
    check_no_grad(
        query=query,
        key=key,
        value=value,
        key_pages=key_pages,
        value_pages=value_pages,
        key_scales=key_scales,
        value_scales=value_scales,
        out=out,
    )
    check_rope(rope)
    tensors = query, key, value, positions, key_pages, value_pages, slot_mapping, key_scales, value_scales
    if not torch.compiler.is_compiling():
        return _rope_store_kv(*tensors, rope, layout, out, backend)
    written = key_pages, value_pages, key_scales, value_scales
    if not fits_graph(*(t for t in written if t is not None)):
        between: torch.Tensor = _rope_store_kv_between_graphs(*tensors, rope, layout, out, backend)
        return between
    rotated: torch.Tensor = _rope_store_kv_op(*tensors, rope.pack(), layout, backend)
    if out is not None:
        _check_out(out, query)
        rotated = out.copy_(rotated)
    return rotated


def _rope_store_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    rope: RotaryEmbedding,
    layout: str,
    out: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    key_pages, value_pages = to_nhd(key_pages, value_pages, layout)
    shapes = Shapes()
    check_store(shapes, key, value, key_pages, value_pages, slot_mapping, layout, key_scales, value_scales)
    # Codes are no numbers to turn.
    check_floating("key", key)
    shapes.check("query", query, "T Hq D")
    shapes.check("positions", positions, "T")
    check_floating("query", query)
    check_last_dim_contiguous("query", query)
    check_dtype("positions", positions, torch.int64)
    for name, tensor in (("query", query), ("positions", positions)):
        check_device(name, tensor, key_pages.device, "key_pages")
    if rope.dim > shapes["D"]:
        raise ValueError(f"rope.dim must be at most {shapes['D']} (D of query), got {rope.dim}.")
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    else:
        _check_out(out, query)
        inputs = {"query": query, "key": key, "value": value, "positions": positions, "slot_mapping": slot_mapping}
        pages = {"key_pages": key_pages, "value_pages": value_pages}
        check_no_overlap("out", out, **inputs, **pages, key_scales=key_scales, value_scales=value_scales)
    call = OpCall(
        "rope_store_kv",
        key_pages.device.type,
        (query.dtype, key.dtype, value.dtype, key_pages.dtype),
        shapes["D"],
        shapes["Dv"],
        _SCALES if key_scales is not None else frozenset(),
    )
    run = select(call, backend)
    run(query, key, value, positions, rope, key_pages, value_pages, slot_mapping, key_scales, value_scales, out)
    return out


def _check_out(out: torch.Tensor, query: torch.Tensor) -> None:
    # Shapes asks what a graph cannot hold, so only for its words.
    if not isinstance(out, torch.Tensor) or out.shape != query.shape:
        num_tokens, num_heads, head_dim = query.shape
        Shapes(T=num_tokens, Hq=num_heads, D=head_dim).check("out", out, "T Hq D")
    check_dtype("out", out, query.dtype)
    check_device("out", out, query.device, "query")
    check_contiguous("out", out)


@torch.library.custom_op(
    "pagedkv::rope_store_kv", mutates_args=("key_pages", "value_pages", "key_scales", "value_scales")
)
def _rope_store_kv_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    rope: Sequence[float],
    layout: str,
    backend: str,
) -> torch.Tensor:
    tensors = query, key, value, positions, key_pages, value_pages, slot_mapping, key_scales, value_scales
    return _rope_store_kv(*tensors, RotaryEmbedding.unpack(rope), layout, None, backend)


@_rope_store_kv_op.register_fake
def _rope_store_kv_shape(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    rope: Sequence[float],
    layout: str,
    backend: str,
) -> torch.Tensor:
    return query.new_empty(query.shape)


_rope_store_kv_between_graphs = between_graphs(_rope_store_kv)
