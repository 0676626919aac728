"""kv_caching: new keys and values behind those that a dense cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...kernels.backend import OpCall
from .between_graphs import runs_between_graphs
from .cache_moves import store_tokens
from .handle import Handle, handle_of
from .operator_checks import FLOATING, Sizes, check_dtype, check_handle, check_runs, check_writable, described
from .operator_descriptor import OperatorDescriptor
from .tensor_descriptor import TensorDescriptor, TensorLike
from .workspace import WorkspaceLayout

__all__ = ["KvCachingDescriptor", "kv_caching"]


class KvCachingDescriptor(OperatorDescriptor):
    """The operator for caches, tokens and lengths of given shapes, strides and dtypes.

    Shapes: k_cache [B, H, M, D]; v_cache [B, H, M, Dv]; k [B, H, L, D]; v [B, H, L, Dv]; past_kv_lengths [B] int32 or
            int64. float32, float16 or bfloat16, the same for all four. Every stride is honoured.
    Rule:   token i of request b goes to position past_kv_lengths[b] + i.
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
        past_kv_lengths: TensorLike | None,
    ) -> KvCachingDescriptor:
        """Checks everything but values; keeps no tensor.

        Raises: InfiniopError: NULL_POINTER, BAD_TENSOR_DTYPE, BAD_TENSOR_SHAPE, BAD_TENSOR_STRIDES,
                DEVICE_TYPE_NOT_SUPPORTED, asked in this order.
        """
        check_handle(handle)
        return cls(
            handle,
            described(handle, "k_cache", k_cache),
            described(handle, "v_cache", v_cache),
            described(handle, "k", k),
            described(handle, "v", v),
            described(handle, "past_kv_lengths", past_kv_lengths),
        )

    def __init__(
        self,
        handle: Handle,
        k_cache: TensorDescriptor,
        v_cache: TensorDescriptor,
        k: TensorDescriptor,
        v: TensorDescriptor,
        past_kv_lengths: TensorDescriptor,
    ) -> None:
        check_dtype("k_cache", k_cache, *FLOATING)
        for name, tensor in (("v_cache", v_cache), ("k", k), ("v", v)):
            check_dtype(name, tensor, k_cache.dtype, like="k_cache")
        check_dtype("past_kv_lengths", past_kv_lengths, torch.int32, torch.int64)
        sizes = Sizes()
        sizes.check("k_cache", k_cache, "B H M D")
        sizes.check("v_cache", v_cache, "B H M Dv")
        sizes.check("k", k, "B H L D")
        sizes.check("v", v, "B H L Dv")
        sizes.check("past_kv_lengths", past_kv_lengths, "B")
        check_writable("k_cache", k_cache)
        check_writable("v_cache", v_cache)
        check_runs(handle, OpCall("store_kv", handle.device.type, (k_cache.dtype,) * 2))
        self._num_requests, self._num_new, self._max_len = sizes["B"], sizes["L"], sizes["M"]
        self._k_has_rows = k.has_contiguous_rows and k_cache.has_contiguous_rows
        self._v_has_rows = v.has_contiguous_rows and v_cache.has_contiguous_rows
        self._is_packed = all(given.strides[0] == self._num_new * given.strides[2] for given in (k, v))
        slots, starts = (self._num_requests * self._num_new,), (self._num_requests,)
        workspace = WorkspaceLayout(*((shape, torch.int64) for shape in (slots, starts, starts, (self._num_new,))))
        tensors: dict[str, TensorDescriptor | None]
        tensors = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "past_kv_lengths": past_kv_lengths}
        is_one_round = self._is_packed or min(self._num_requests, self._num_new) <= 1
        moves_once = is_one_round and self._k_has_rows and self._v_has_rows
        super().__init__(
            handle, tensors, workspace, results=("k_cache", "v_cache"), movable=("k", "v") if moves_once else ()
        )

    def calculate(
        self,
        workspace: torch.Tensor | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past_kv_lengths: torch.Tensor,
        *,
        stream: Any = None,
    ) -> None:
        """Writes the tokens behind those that are there, in place; tensors are as created.

        Owns:   writes only those positions, and the workspace. Nothing is written if the call raises.
        Raises: InfiniopError: the status of what is not as created; INSUFFICIENT_WORKSPACE; BAD_PARAM for a length
                below 0, or that leaves no room for L more, for tensors that share memory, and after destroy.
        """
        self._calculate(workspace, (k_cache, v_cache, k, v, past_kv_lengths), stream)

    def _run(
        self,
        parts: list[torch.Tensor],
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past_kv_lengths: torch.Tensor,
    ) -> None:
        if not self._num_requests or not self._num_new:
            return
        for keys, values, places in self._moves(k, v, self._slots(past_kv_lengths, *parts)):
            store_tokens(
                keys,
                values,
                k_cache,
                v_cache,
                places,
                k_has_rows=self._k_has_rows,
                v_has_rows=self._v_has_rows,
                backend=self.handle.backend,
            )

    def _slots(
        self,
        past_kv_lengths: torch.Tensor,
        slots: torch.Tensor,
        past: torch.Tensor,
        starts: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """[B, L]: a request is a page of M slots."""
        past.copy_(past_kv_lengths)
        most = self._max_len - self._num_new
        if int(past.min()) < 0 or int(past.max()) > most:
            request = int(((past < 0) | (past > most)).int().argmax())
            raise ValueError(
                f"past_kv_lengths of request {request} must be in 0..{most} ({self._num_new} new tokens, max_len "
                f"{self._max_len}), got {int(past[request])}."
            )
        # Without a device torch would take the default one, which need not be that of `out`.
        device, end = self.handle.device, self._num_requests * self._max_len
        torch.arange(0, end, self._max_len, dtype=torch.int64, device=device, out=starts)
        torch.arange(self._num_new, dtype=torch.int64, device=device, out=positions)
        places = slots.view(self._num_requests, self._num_new)
        return torch.add(starts.add_(past)[:, None], positions, out=places)

    def _moves(
        self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """As few rounds of [T, H, D] as there are without copying: all tokens, one of each request, or one request."""
        if self._is_packed:
            yield k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1), slots.flatten()
        elif self._num_new <= self._num_requests:
            for i in range(self._num_new):
                yield k[:, :, i], v[:, :, i], slots[:, i]
        else:
            for request in range(self._num_requests):
                yield k[request].transpose(0, 1), v[request].transpose(0, 1), slots[request]


@runs_between_graphs
def kv_caching(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_kv_lengths: torch.Tensor,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes new keys and values behind those of a dense cache, in place, and returns the caches.

    Shapes: as `KvCachingDescriptor`, which is made for the call.
    Raises: InfiniopError, with the codes of `create` and `calculate`. Nothing is written then.

    >>> caches = torch.zeros(2, 1, 8, 16, 64)
    >>> k_cache, v_cache = kv_caching(*caches, *torch.ones(2, 1, 8, 3, 64), torch.tensor([5]))
    >>> k_cache[0, 0, :, 0].tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    handle = handle_of("k_cache", k_cache, backend)
    tensors = k_cache, v_cache, k, v, past_kv_lengths
    descriptor = KvCachingDescriptor.create(handle, *tensors)
    workspace = torch.empty(descriptor.workspace_size, dtype=torch.uint8, device=handle.device)
    descriptor.calculate(workspace, *tensors)
    return k_cache, v_cache
