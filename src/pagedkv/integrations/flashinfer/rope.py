"""flashinfer.rope: queries and keys turned by their positions, in new tensors, in place, or on the way to float8.

All forms leave columns beyond `rotary_dim` as they are. `interleave` False pairs column i with i + rotary_dim / 2, True
pairs 2i with 2i + 1. Index tensors are int32 or int64, on any device. Nothing is written if a call raises.
"""

from __future__ import annotations

import torch

from ...kernels import Llama31Scaling, RotaryEmbedding
from ...kernels.pages import check_no_grad, check_writable
from ...kernels.reference.rope import rotate
from ...kernels.rope import apply_rope as turn
from ...shapes import Shapes, check_device, check_floating, dtype_name
from .arguments import check_result_buffer
from .vendor_only import Refused, lookup

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "mla_rope_quantize_fp8",
    "rope_quantize_fp8",
]

Pair = tuple[torch.Tensor, torch.Tensor]
Quadruple = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 10000.0,
) -> Pair:
    """Queries and keys of packed requests, turned.

    Shapes: q [nnz, Hq, D]; k [nnz, Hk, D]; indptr [B + 1], from 0, indptr[-1] <= nnz; offsets [B].
    Rule:   row i of request b is at position offsets[b] + i - indptr[b]; pair j turns by
            rope_theta ** (-2j / rotary_dim) / rope_scale a position, rotary_dim None is D. Rows beyond indptr[-1] stay.
    Raises: ValueError, TypeError for what breaks the lines above.
    """
    rope = _embedding(q, rotary_dim, interleave, rope_scale, rope_theta)
    return _turned(q, k, _ragged_positions(indptr, offsets, q), rope)


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 10000.0,
) -> None:
    """`apply_rope` that writes to q and k, which may be views of one packed tensor."""
    rope = _embedding(q, rotary_dim, interleave, rope_scale, rope_theta)
    _write({"q": q, "k": k}, _turned(q, k, _ragged_positions(indptr, offsets, q), rope), rope.dim)


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 10000.0,
) -> Pair:
    """`apply_rope` with the position of each row given: pos_ids [nnz]."""
    rope = _embedding(q, rotary_dim, interleave, rope_scale, rope_theta)
    return _turned(q, k, _positions_of("pos_ids", pos_ids, q), rope)


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 10000.0,
) -> None:
    """`apply_rope_pos_ids` that writes to q and k, which may be views of one packed tensor."""
    rope = _embedding(q, rotary_dim, interleave, rope_scale, rope_theta)
    _write({"q": q, "k": k}, _turned(q, k, _positions_of("pos_ids", pos_ids, q), rope), rope.dim)


def apply_llama31_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 500000.0,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Pair:
    """`apply_rope` with the frequency scaling of Llama 3.1, see Llama31Scaling; rope_scale is its factor."""
    scaling = Llama31Scaling(low_freq_factor, high_freq_factor, old_context_len, rope_scale)
    rope = _embedding(q, rotary_dim, interleave, 1, rope_theta, scaling)
    return _turned(q, k, _ragged_positions(indptr, offsets, q), rope)


def apply_llama31_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 500000.0,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope` that writes to q and k, which may be views of one packed tensor."""
    scaling = Llama31Scaling(low_freq_factor, high_freq_factor, old_context_len, rope_scale)
    rope = _embedding(q, rotary_dim, interleave, 1, rope_theta, scaling)
    _write({"q": q, "k": k}, _turned(q, k, _ragged_positions(indptr, offsets, q), rope), rope.dim)


def apply_llama31_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 500000.0,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Pair:
    """`apply_llama31_rope` with the position of each row given: pos_ids [nnz]."""
    scaling = Llama31Scaling(low_freq_factor, high_freq_factor, old_context_len, rope_scale)
    rope = _embedding(q, rotary_dim, interleave, 1, rope_theta, scaling)
    return _turned(q, k, _positions_of("pos_ids", pos_ids, q), rope)


def apply_llama31_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 500000.0,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope_pos_ids` that writes to q and k, which may be views of one packed tensor."""
    scaling = Llama31Scaling(low_freq_factor, high_freq_factor, old_context_len, rope_scale)
    rope = _embedding(q, rotary_dim, interleave, 1, rope_theta, scaling)
    _write({"q": q, "k": k}, _turned(q, k, _positions_of("pos_ids", pos_ids, q), rope), rope.dim)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> Pair:
    """Queries and keys turned by a table of cosines and sines.

    Shapes: positions [nnz]; query [nnz, Hq * head_size] or [nnz, Hq, head_size], key likewise;
            cos_sin_cache [max_pos, rotary_dim] float32, cosines in the first half of the columns, sines in the second.
    Rule:   is_neox pairs column i with i + rotary_dim / 2, otherwise 2i with 2i + 1; arithmetic is float32.
    Raises: ValueError, TypeError for what breaks the lines above and for a position outside the table.
    """
    rows = {"query": _as_heads("query", query, head_size), "key": _as_heads("key", key, head_size)}
    turned = _turned_by_table(rows, ("positions", positions), cos_sin_cache, is_neox)
    return turned[0].reshape(query.shape), turned[1].reshape(key.shape)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """`apply_rope_with_cos_sin_cache` that writes to query and key, which may be views of one packed tensor."""
    rows = {"query": _as_heads("query", query, head_size), "key": _as_heads("key", key, head_size)}
    turned = _turned_by_table(rows, ("positions", positions), cos_sin_cache, is_neox)
    _write(rows, turned, cos_sin_cache.shape[1])


def rope_quantize_fp8(
    q_rope: torch.Tensor,
    k_rope: torch.Tensor,
    q_nope: torch.Tensor | None,
    k_nope: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    pos_ids: torch.Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: torch.Tensor | None = None,
    k_rope_out: torch.Tensor | None = None,
    q_nope_out: torch.Tensor | None = None,
    k_nope_out: torch.Tensor | None = None,
    enable_pdl: bool = False,
    backend: str = "cuda",
) -> Quadruple:
    """The rope parts turned, then all parts scaled and rounded to float8; returns q_rope, k_rope, q_nope, k_nope.

    Shapes: q_rope [nnz, Hq, R]; k_rope [nnz, Hk, R], or [nnz, R] of one head; q_nope [nnz, Hq, C]; k_nope [nnz, Hk, C],
            or [nnz, C]; a part given as None has width 0. cos_sin_cache [max_pos, R], as
            `apply_rope_with_cos_sin_cache` takes it; pos_ids [nnz]. Results have the shapes of their parts.
    Rule:   float8(x * scale) with float32 arithmetic, cut to the largest finite number of the dtype; NaN stays NaN.
            quantize_dtype is float8_e4m3fn or float8_e5m2; None is the dtype of the first result given, otherwise
            float8_e4m3fn. Results that are given are written and returned.
            enable_pdl and backend choose among kernels of one card; here they change nothing.
    Raises: ValueError, TypeError for what breaks the lines above.
    """
    outs = {"q_rope_out": q_rope_out, "k_rope_out": k_rope_out, "q_nope_out": q_nope_out, "k_nope_out": k_nope_out}
    dtype = quantize_dtype or next((out.dtype for out in outs.values() if out is not None), torch.float8_e4m3fn)
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"quantize_dtype must be float8_e4m3fn or float8_e5m2, got {dtype}.")
    q_nope = q_rope[..., :0] if q_nope is None else q_nope
    k_nope = k_rope[..., :0] if k_nope is None else k_nope
    _check_parts(q_rope, k_rope, q_nope, k_nope)
    rows = {"q_rope": q_rope.float(), "k_rope": (k_rope[:, None] if k_rope.dim() == 2 else k_rope).float()}
    turned_q, turned_k = _turned_by_table(rows, ("pos_ids", pos_ids), cos_sin_cache, is_neox)
    if cos_sin_cache.shape[1] != q_rope.shape[2]:
        raise ValueError(f"cos_sin_cache must have {q_rope.shape[2]} columns (R), got {cos_sin_cache.shape[1]}.")
    parts = turned_q, turned_k.reshape(k_rope.shape), q_nope, k_nope
    scales = quant_scale_q, quant_scale_kv, quant_scale_q, quant_scale_kv
    most = torch.finfo(dtype).max
    results = [(x.float() * scale).clamp(-most, most).to(dtype) for x, scale in zip(parts, scales, strict=True)]
    for (name, out), result in zip(outs.items(), results, strict=True):
        if out is not None:
            check_result_buffer(name, out, tuple(result.shape), dtype, q_rope.device)
    stored = [result if out is None else out.copy_(result) for out, result in zip(outs.values(), results, strict=True)]
    return stored[0], stored[1], stored[2], stored[3]


def mla_rope_quantize_fp8(
    q_rope: torch.Tensor,
    k_rope: torch.Tensor,
    q_nope: torch.Tensor,
    k_nope: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    pos_ids: torch.Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: torch.Tensor | None = None,
    k_rope_out: torch.Tensor | None = None,
    q_nope_out: torch.Tensor | None = None,
    k_nope_out: torch.Tensor | None = None,
    enable_pdl: bool = False,
) -> Quadruple:
    """`rope_quantize_fp8` of latent attention: keys are k_rope [nnz, R] and latents k_nope [nnz, C]."""
    parts, outs = (q_rope, k_rope, q_nope, k_nope), (q_rope_out, k_rope_out, q_nope_out, k_nope_out)
    scales = quant_scale_q, quant_scale_kv
    return rope_quantize_fp8(*parts, cos_sin_cache, pos_ids, is_neox, quantize_dtype, *scales, *outs, enable_pdl)


def _embedding(
    q: torch.Tensor,
    rotary_dim: int | None,
    interleave: bool,
    rope_scale: float,
    rope_theta: float,
    llama31: Llama31Scaling | None = None,
) -> RotaryEmbedding:
    Shapes().check("q", q, "nnz Hq D")
    dim = q.shape[2] if rotary_dim is None else rotary_dim
    if dim < 2 or dim % 2 or dim > q.shape[2]:
        raise ValueError(f"rotary_dim must be even and between 2 and {q.shape[2]} (D of q), got {dim}.")
    return RotaryEmbedding(dim, rope_theta, rope_scale, bool(interleave), llama31)


def _turned(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, rope: RotaryEmbedding) -> Pair:
    """New tensors; rows beyond the positions are copied."""
    _check_rows({"q": q, "k": k})
    rows = positions.shape[0]
    turned = [turn(x[:rows], positions, rope) for x in (q, k)]
    if rows < q.shape[0]:
        turned = [torch.cat((new, x[rows:])) for new, x in zip(turned, (q, k), strict=True)]
    return turned[0], turned[1]


def _check_rows(rows: dict[str, torch.Tensor]) -> None:
    shapes, (owner, first) = Shapes(), next(iter(rows.items()))
    for (name, tensor), heads in zip(rows.items(), ("Hq", "Hk"), strict=True):
        shapes.check(name, tensor, f"nnz {heads} D")
        check_floating(name, tensor)
        check_device(name, tensor, first.device, owner)
    check_no_grad(**rows)


def _write(tensors: dict[str, torch.Tensor], turned: Pair, rotary_dim: int) -> None:
    """Writes the columns that turn, and no others."""
    for name, tensor in tensors.items():
        check_writable(name, tensor)
    for tensor, new in zip(tensors.values(), turned, strict=True):
        tensor[..., :rotary_dim].copy_(new[..., :rotary_dim])


def _int64(name: str, indices: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(indices).__name__}.")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must have dtype int32 or int64, got {dtype_name(indices.dtype)}.")
    return indices.to(device, torch.int64)


def _positions_of(name: str, positions: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    positions = _int64(name, positions, q.device)
    Shapes(nnz=q.shape[0]).check(name, positions, "nnz")
    return positions


def _ragged_positions(indptr: torch.Tensor, offsets: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[indptr[-1]] int64 on the device of q."""
    starts, offsets = _int64("indptr", indptr, "cpu"), _int64("offsets", offsets, "cpu")
    if starts.dim() != 1 or offsets.dim() != 1 or starts.shape[0] != offsets.shape[0] + 1:
        raise ValueError(
            f"indptr must have shape [B + 1] with offsets [B], got {list(starts.shape)} and {list(offsets.shape)}."
        )
    num_rows = starts.diff()
    if int(starts[0]) != 0 or bool((num_rows < 0).any()) or int(starts[-1]) > q.shape[0]:
        raise ValueError(f"indptr must rise from 0 to at most {q.shape[0]} (nnz of q), got {starts.tolist()}.")
    first = (offsets - starts[:-1]).repeat_interleave(num_rows)
    return (first + torch.arange(int(starts[-1]), device="cpu")).to(q.device)


def _as_heads(name: str, rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """[nnz, H, head_size], a view."""
    if not isinstance(rows, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}.")
    if head_size > 0 and rows.dim() == 2 and rows.shape[1] % head_size == 0:
        return rows.view(rows.shape[0], rows.shape[1] // head_size, head_size)
    if rows.dim() == 3 and rows.shape[2] == head_size:
        return rows
    raise ValueError(
        f"{name} must have shape [nnz, H * head_size] or [nnz, H, head_size] with head_size = {head_size}, "
        f"got {list(rows.shape)}."
    )


def _turned_by_table(
    rows: dict[str, torch.Tensor], named_positions: tuple[str, torch.Tensor], table: torch.Tensor, is_neox: bool
) -> Pair:
    """Two named tensors [nnz, H, D] as new ones."""
    queries, keys = rows.values()
    _check_rows(rows)
    Shapes().check("cos_sin_cache", table, "max_pos rotary_dim")
    check_device("cos_sin_cache", table, queries.device, next(iter(rows)))
    if table.dtype != torch.float32:
        raise ValueError(f"cos_sin_cache must have dtype float32, got {dtype_name(table.dtype)}.")
    (num_positions, rotary_dim), dim = table.shape, queries.shape[2]
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > dim:
        raise ValueError(f"cos_sin_cache must have an even number of columns, 2 to {dim} (D), got {rotary_dim}.")
    name, positions = named_positions[0], _positions_of(*named_positions, queries)
    outside = positions[(positions < 0) | (positions >= num_positions)]
    if outside.numel():
        raise ValueError(f"{name} must be in [0, {num_positions}) (rows of cos_sin_cache), got {int(outside[0])}.")
    cos, sin = table[positions].chunk(2, dim=1)
    turned = [rotate(tensor.float(), cos, sin, not is_neox).to(tensor.dtype) for tensor in (queries, keys)]
    return turned[0], turned[1]


def _check_parts(q_rope: torch.Tensor, k_rope: torch.Tensor, q_nope: torch.Tensor, k_nope: torch.Tensor) -> None:
    shapes = Shapes()
    keys = "nnz" if isinstance(k_rope, torch.Tensor) and k_rope.dim() == 2 else "nnz Hk"
    parts = {"q_rope": q_rope, "k_rope": k_rope, "q_nope": q_nope, "k_nope": k_nope}
    # Either part without rotation may be absent, so that each has a width of its own.
    for (name, part), pattern in zip(parts.items(), ("nnz Hq R", f"{keys} R", "nnz Hq C", f"{keys} Ck"), strict=True):
        shapes.check(name, part, pattern)
        check_floating(name, part)
        check_device(name, part, q_rope.device, "q_rope")
    check_no_grad(**parts)


def __getattr__(name: str) -> Refused:
    """Names of one vendor's libraries: there to be imported, and refusing when used."""
    return lookup(name, __name__)
