"""What decode and prefill attention share: checks, the plan of a call, and where results go."""

from __future__ import annotations

import torch

from ...attention import plan_attention
from ...kernels import paged_attention
from ...kernels.attention_checks import as_float32
from ...kernels.backend import OpCall
from .block_tables import page_table_of, query_indptr_of
from .handle import Handle
from .operator_checks import (
    FLOATING,
    INDEX_DTYPES,
    Sizes,
    check_contiguous_rows,
    check_dtype,
    check_runs,
    check_scales,
    check_writable,
    described,
    described_or_none,
)
from .operator_descriptor import OperatorDescriptor
from .status import InfiniopError, InfiniStatus, as_infiniop_errors
from .tensor_descriptor import TensorDescriptor, TensorLike
from .tensor_memory import is_dense
from .workspace import WorkspaceLayout

__all__ = ["AttentionDescriptor", "described_tensors", "given_of", "result_of", "workspace_of"]

_F8 = torch.float8_e4m3fn


class AttentionDescriptor(OperatorDescriptor):
    """What decode and prefill share: everything but how rows of q belong to sequences."""

    _rows = "S"  # of q and out

    def __init__(self, handle: Handle, tensors: dict[str, TensorDescriptor | None], scale: float) -> None:
        out, q, k_cache, v_cache = (given_of(tensors, name) for name in ("out", "q", "k_cache", "v_cache"))
        tables, lens = (given_of(tensors, name) for name in ("block_tables", "seq_lens"))
        alibi_slopes, k_scale, v_scale = (tensors[name] for name in ("alibi_slopes", "k_scale", "v_scale"))
        _check_dtypes(tensors)
        sizes = Sizes()
        sizes.check("q", q, f"{self._rows} Hq D")
        sizes.check("block_tables", tables, "S M")
        sizes.check("seq_lens", lens, "S")
        sizes.check("k_cache", k_cache, "N Hk P D")
        sizes.check("v_cache", v_cache, "N Hk P Dv")
        sizes.check("out", out, f"{self._rows} Hq Dv")
        if alibi_slopes is not None:
            sizes.check("alibi_slopes", alibi_slopes, "Hq")
        _check_heads(sizes)
        check_scales(sizes, k_cache.dtype, "N Hk P", k_scale, v_scale)
        for name, tensor in (("q", q), ("out", out), ("k_cache", k_cache), ("v_cache", v_cache)):
            check_contiguous_rows(name, tensor)
        check_writable("out", out)
        with as_infiniop_errors():
            self._scale = as_float32("scale", scale)
        self._sizes = sizes
        check_runs(handle, _op_call(handle, tensors, sizes))
        # The kernels fill contiguous memory; other results wait in the workspace.
        parts = [] if _is_contiguous(out) else [(out.shape, out.dtype)]
        super().__init__(handle, tensors, WorkspaceLayout(*parts), results=("out",))

    def _attend(
        self,
        parts: list[torch.Tensor],
        out: torch.Tensor,
        q: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        cum_seq_lens_q: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> None:
        sizes = self._sizes
        table = page_table_of(block_tables, seq_lens, block_size=sizes["P"], num_blocks=sizes["N"])
        if cum_seq_lens_q is None:
            query_indptr = torch.arange(sizes["S"] + 1, dtype=torch.int32, device=self.handle.device)
        else:
            query_indptr = query_indptr_of(cum_seq_lens_q, seq_lens, sizes["T"])
        plan = plan_attention(
            query_indptr,
            table,
            num_q_heads=sizes["Hq"],
            num_kv_heads=sizes["Hk"],
            head_dim=sizes["D"],
            value_dim=sizes["Dv"],
        )
        result = parts[0] if parts else out
        paged_attention(
            q,
            *caches,
            plan,
            layout="HND",
            sm_scale=self._scale,
            alibi_slopes=alibi_slopes,
            key_scales=scales[0],
            value_scales=scales[1],
            out=result,
            backend=self.handle.backend,
        )
        if parts:
            out.copy_(result)


def described_tensors(
    handle: Handle, given: dict[str, TensorLike | None], optional: dict[str, TensorLike | None]
) -> dict[str, TensorDescriptor | None]:
    tensors: dict[str, TensorDescriptor | None] = {}
    for name, tensor in given.items():
        tensors[name] = described(handle, name, tensor)
    for name, tensor in optional.items():
        tensors[name] = described_or_none(handle, name, tensor)
    return tensors


def given_of(tensors: dict[str, TensorDescriptor | None], name: str) -> TensorDescriptor:
    tensor = tensors[name]
    assert tensor is not None  # described() refused None
    return tensor


def _check_dtypes(tensors: dict[str, TensorDescriptor | None]) -> None:
    q, k_cache, tables = (given_of(tensors, name) for name in ("q", "k_cache", "block_tables"))
    check_dtype("q", q, *FLOATING)
    check_dtype("out", given_of(tensors, "out"), q.dtype, like="q")
    check_dtype("k_cache", k_cache, q.dtype, _F8)
    check_dtype("v_cache", given_of(tensors, "v_cache"), k_cache.dtype, like="k_cache")
    check_dtype("block_tables", tables, *INDEX_DTYPES)
    for name in ("seq_lens", "cum_seq_lens_q"):
        if name in tensors:
            check_dtype(name, given_of(tensors, name), tables.dtype, like="block_tables")
    alibi_slopes = tensors["alibi_slopes"]
    if alibi_slopes is not None:
        check_dtype("alibi_slopes", alibi_slopes, torch.float32)


def _check_heads(sizes: Sizes) -> None:
    for symbol in ("Hq", "Hk", "D", "Dv", "P"):
        if not sizes[symbol]:
            raise InfiniopError(InfiniStatus.BAD_TENSOR_SHAPE, f"{symbol} of q and caches must be at least 1, got 0.")
    if sizes["Hq"] % sizes["Hk"]:
        raise InfiniopError(
            InfiniStatus.BAD_TENSOR_SHAPE,
            f"heads of q must be a multiple of {sizes['Hk']} (heads of k_cache), got {sizes['Hq']}.",
        )


def _op_call(handle: Handle, tensors: dict[str, TensorDescriptor | None], sizes: Sizes) -> OpCall:
    """What `paged_attention` will ask of the back end."""
    dtypes = tuple(given_of(tensors, name).dtype for name in ("q", "k_cache", "v_cache", "out"))
    named = {"alibi_slopes": "alibi_slopes", "k_scale": "scales"}
    features = frozenset(feature for name, feature in named.items() if tensors[name] is not None)
    return OpCall("paged_attention", handle.device.type, dtypes, sizes["D"], sizes["Dv"], features)


def _is_contiguous(given: TensorDescriptor) -> bool:
    expected = 1
    for size, stride in zip(reversed(given.shape), reversed(given.strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in given.shape
        expected *= size
    return True


def result_of(q: torch.Tensor, v_cache: object, out: torch.Tensor | None) -> torch.Tensor:
    """out, or a new one; whatever is wrong with q and v_cache is said when the descriptor is made."""
    if out is not None:
        return out
    shape = list(q.shape)
    if isinstance(v_cache, torch.Tensor) and is_dense(v_cache) and v_cache.dim() and shape:
        shape[-1] = v_cache.shape[-1]
    return q.new_empty(shape)


def workspace_of(descriptor: OperatorDescriptor) -> torch.Tensor | None:
    size = descriptor.workspace_size
    return torch.empty(size, dtype=torch.uint8, device=descriptor.handle.device) if size else None
