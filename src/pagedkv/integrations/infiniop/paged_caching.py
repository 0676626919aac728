"""paged_caching: new keys and values into the slots of a paged pool."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ...kernels.backend import OpCall
from ...kernels.store_kv import store_kv
from .between_graphs import runs_between_graphs
from .cache_moves import store_tokens
from .float8_rows import Float8Scratch, quantize_rows
from .handle import Handle, handle_of
from .operator_checks import (
    FLOATING,
    Sizes,
    check_dtype,
    check_handle,
    check_runs,
    check_scales,
    check_writable,
    described,
    described_or_none,
)
from .operator_descriptor import OperatorDescriptor
from .tensor_descriptor import TensorDescriptor, TensorLike
from .tensor_memory import is_dense
from .workspace import WorkspaceLayout

__all__ = ["PagedCachingDescriptor", "paged_caching"]

_F8 = torch.float8_e4m3fn


class PagedCachingDescriptor(OperatorDescriptor):
    """The operator for caches, tokens and slots of given shapes, strides and dtypes.

    Shapes: k_cache [N, H, P, D]; v_cache [N, H, P, >= Dv], of which the first Dv columns are written; k [T, H, D];
            v [T, H, Dv]; slot_mapping [T] int64 or int32. Every stride is honoured, that of the last dim included.
    Dtypes: float32, float16, bfloat16, the same for all four: bits are moved. Or caches of float8_e4m3fn with k_scale
            and v_scale [N, H, P] float32, and k and v of float16 or bfloat16: each row is quantised on the way in.
    Slots:  slot = block * P + offset. A negative slot is skipped. Duplicates: the last one wins.
    """

    @classmethod
    @runs_between_graphs
    def create(
        cls,
        handle: Handle,
        k_cache: TensorLike | None,
        v_cache: TensorLike | None,
        k: TensorLike | None,
        v: TensorLike | None,
        slot_mapping: TensorLike | None,
        k_scale: TensorLike | None = None,
        v_scale: TensorLike | None = None,
    ) -> PagedCachingDescriptor:
        """Checks everything but values; keeps no tensor.

        Raises: InfiniopError: NULL_POINTER for a tensor that is missing; then BAD_TENSOR_DTYPE of k, v, the caches,
                slot_mapping; BAD_TENSOR_SHAPE; BAD_PARAM for scales without float8 caches and for these without
                scales; BAD_TENSOR_STRIDES for results that overlap themselves; DEVICE_TYPE_NOT_SUPPORTED.
        """
        check_handle(handle)
        tensors: dict[str, TensorDescriptor | None] = {
            "k_cache": described(handle, "k_cache", k_cache),
            "v_cache": described(handle, "v_cache", v_cache),
            "k": described(handle, "k", k),
            "v": described(handle, "v", v),
            "slot_mapping": described(handle, "slot_mapping", slot_mapping),
            "k_scale": described_or_none(handle, "k_scale", k_scale),
            "v_scale": described_or_none(handle, "v_scale", v_scale),
        }
        return cls(handle, *tensors.values())  # type: ignore[arg-type]

    def __init__(
        self,
        handle: Handle,
        k_cache: TensorDescriptor,
        v_cache: TensorDescriptor,
        k: TensorDescriptor,
        v: TensorDescriptor,
        slot_mapping: TensorDescriptor,
        k_scale: TensorDescriptor | None,
        v_scale: TensorDescriptor | None,
    ) -> None:
        self._is_quantised = k_cache.dtype == _F8
        _check_dtypes(k_cache, v_cache, k, v, slot_mapping)
        sizes = Sizes()
        sizes.check("k", k, "T H D")
        sizes.check("v", v, "T H Dv")
        sizes.check("slot_mapping", slot_mapping, "T")
        sizes.check("k_cache", k_cache, "N H P D")
        sizes.check("v_cache", v_cache, "N H P Dv+")
        check_scales(sizes, k_cache.dtype, "N H P", k_scale, v_scale)
        results = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
        for name, result in results.items():
            check_writable(name, result)
        moved = (k_cache.dtype, torch.float32) if self._is_quantised else (k_cache.dtype,)
        check_runs(handle, *(OpCall("store_kv", handle.device.type, (dtype, dtype)) for dtype in moved))
        self._num_tokens = sizes["T"]
        # Codes of the tokens are contiguous in the workspace.
        self._k_has_rows = k_cache.has_contiguous_rows and (self._is_quantised or k.has_contiguous_rows)
        self._v_has_rows = v_cache.has_contiguous_rows and (self._is_quantised or v.has_contiguous_rows)
        self._widens = slot_mapping.dtype != torch.int64
        tensors = {"k": k, "v": v, "slot_mapping": slot_mapping, "k_scale": k_scale, "v_scale": v_scale}
        # Codes are made of all tokens before the first of them is stored.
        moves_once = self._is_quantised or (self._k_has_rows and self._v_has_rows)
        super().__init__(
            handle,
            {"k_cache": k_cache, "v_cache": v_cache, **tensors},
            self._layout(sizes),
            results=tuple(results),
            movable=("k", "v") if moves_once else (),
        )

    def _layout(self, sizes: Sizes) -> WorkspaceLayout:
        num_tokens, heads, dim, value_dim = (sizes[symbol] for symbol in ("T", "H", "D", "Dv"))
        parts: list[tuple[tuple[int, ...], torch.dtype]] = []
        if self._widens:
            parts.append(((num_tokens,), torch.int64))
        if self._is_quantised:
            parts += [((num_tokens, heads, dim), _F8), ((num_tokens, heads, value_dim), _F8)]
            parts += [((num_tokens, heads), torch.float32)] * 2
            parts += Float8Scratch.parts(num_tokens, heads, max(dim, value_dim))
        return WorkspaceLayout(*parts)

    def calculate(
        self,
        workspace: torch.Tensor | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        *,
        stream: Any = None,
    ) -> None:
        """Writes the tokens into their slots, in place; tensors are as created. Allocates no tensor.

        Owns:   writes only the named slots, and the workspace. Nothing is written if the call raises.
        Raises: InfiniopError: the status of what is not as created; INSUFFICIENT_WORKSPACE; BAD_PARAM for a slot
                beyond the pool, for tensors that share memory, and after destroy. k and v may lie in the caches, and
                count as they were before the call, if last dims are contiguous or caches are float8.
        """
        self._calculate(workspace, (k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale), stream)

    def _run(
        self,
        parts: list[torch.Tensor],
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        if not self._num_tokens:
            return
        if self._widens:
            slot_mapping = parts.pop(0).copy_(slot_mapping)
        if k_scale is None or v_scale is None:
            self._move(k, v, k_cache, v_cache, slot_mapping)
            return
        k_codes, v_codes, k_factors, v_factors, *scratch = parts
        quantize_rows(k, k_codes, k_factors, Float8Scratch(*scratch))
        quantize_rows(v, v_codes, v_factors, Float8Scratch(*scratch))
        self._move(k_codes, v_codes, k_cache, v_cache, slot_mapping)
        # Scales are rows of one element.
        store_kv(
            k_factors.unsqueeze(-1),
            v_factors.unsqueeze(-1),
            k_scale.unsqueeze(-1),
            v_scale.unsqueeze(-1),
            slot_mapping,
            layout="HND",
            backend=self.handle.backend,
        )

    def _move(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        store_tokens(
            k,
            v,
            k_cache,
            v_cache,
            slots,
            k_has_rows=self._k_has_rows,
            v_has_rows=self._v_has_rows,
            backend=self.handle.backend,
        )


@runs_between_graphs
def paged_caching(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes new keys and values into their slots, in place, and returns the caches.

    Shapes: as `PagedCachingDescriptor`, one of which is made for tensors of new metadata and kept for the next.
    Raises: InfiniopError, with the codes of `create` and `calculate`. Nothing is written then.

    >>> caches = torch.zeros(2, 4, 8, 16, 64)
    >>> k_cache, v_cache = paged_caching(*caches, *torch.ones(2, 3, 8, 64), torch.tensor([0, -1, 16]))
    >>> k_cache.sum(dim=(1, 2, 3)).tolist()
    [512.0, 512.0, 0.0, 0.0]
    """
    handle = handle_of("k_cache", k_cache, backend)
    tensors = k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale
    if all(tensor is None or is_dense(tensor) for tensor in tensors):
        descriptor = _descriptor(handle, *[None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors])
    else:
        descriptor = PagedCachingDescriptor.create(handle, *tensors)
    size = descriptor.workspace_size
    workspace = torch.empty(size, dtype=torch.uint8, device=handle.device) if size else None
    descriptor.calculate(workspace, *tensors)
    return k_cache, v_cache


@lru_cache(maxsize=128)
def _descriptor(handle: Handle, *metadata: tuple[Any, ...] | None) -> PagedCachingDescriptor:
    """Kept, since making one takes as long as a small move; the key is all that it is made of."""
    return PagedCachingDescriptor.create(
        handle, *(None if given is None else TensorDescriptor(*given) for given in metadata)
    )


def _check_dtypes(
    k_cache: TensorDescriptor,
    v_cache: TensorDescriptor,
    k: TensorDescriptor,
    v: TensorDescriptor,
    slot_mapping: TensorDescriptor,
) -> None:
    is_quantised = k_cache.dtype == _F8
    check_dtype("k", k, *(FLOATING[:2] if is_quantised else FLOATING))
    check_dtype("v", v, k.dtype, like="k")
    if not is_quantised:
        check_dtype("k_cache", k_cache, k.dtype, like="k")
    check_dtype("v_cache", v_cache, k_cache.dtype, like="k_cache")
    check_dtype("slot_mapping", slot_mapping, torch.int64, torch.int32)
