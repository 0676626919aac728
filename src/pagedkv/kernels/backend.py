"""One table, op x back end: who can run a call, who is chosen, and why the others were not.

A back end is a name, a priority, one function an op (signatures: the `Reference` line of each op's docstring) and a
function that says why it cannot run a given call. Explicitly named, a back end runs the call or the call fails;
"auto" takes the first by priority that can, and says once a kind of call which one and why not the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..errors import BackendUnavailableError
from ..shapes import dtype_name

__all__ = ["Backend", "BackendStatus", "OpCall", "backends", "register_backend", "select", "unregister_backend"]

logger = logging.getLogger("pagedkv")

OPS = (
    "store_kv",
    "gather_kv",
    "copy_pages",
    "quantize_kv",
    "apply_rope",
    "rope_store_kv",
    "paged_attention",
    "mla_attention",
    "merge_states",
)


class OpCall(NamedTuple):
    """What a back end needs to know of a call to accept or reject it; everything else was checked before."""

    op: str
    device_type: str
    dtypes: tuple[torch.dtype, ...]
    head_dim: int = 0
    value_dim: int = 0
    features: frozenset[str] = frozenset()

    def __str__(self) -> str:
        dtypes = "/".join(dict.fromkeys(map(dtype_name, self.dtypes)))
        extra = f" with {', '.join(sorted(self.features))}" if self.features else ""
        return f"{self.op} on {self.device_type} in {dtypes}{extra}"


@dataclass(frozen=True)
class Backend:
    """One row of the table. `rejects(call)` gives the reason it cannot run the call, or None."""

    name: str
    ops: Mapping[str, Callable[..., Any]]
    rejects: Callable[[OpCall], str | None]
    priority: int
    unavailable: Callable[[], str | None]


@dataclass(frozen=True)
class BackendStatus:
    """What `backends()` says of one back end; `reason` is empty when it is available."""

    name: str
    available: bool
    reason: str
    ops: tuple[str, ...]
    priority: int


_TABLE: dict[str, Backend] = {}


def register_backend(
    name: str,
    *,
    ops: Mapping[str, Callable[..., Any]],
    rejects: Callable[[OpCall], str | None] | None = None,
    priority: int = 0,
    unavailable: Callable[[], str | None] | None = None,
) -> None:
    """Adds a back end: how ROCm-native, Ascend and others are plugged in.

    ops:         op name to function; the ops are those of `pagedkv.kernels.backend.OPS`, any subset.
    rejects:     gets an OpCall, returns why this back end cannot run it, or None. Default: runs everything.
    priority:    "auto" tries higher first; the reference has -100, the native CPU core 0.
    unavailable: returns why the back end cannot run anything on this machine, or None. Asked at the first use.
    Raises:      ValueError for a name that is taken or an op that does not exist.
    """
    if name in _TABLE or name == "auto":
        raise ValueError(f"name of a back end must be new, got {name!r}. Taken: auto, {', '.join(_TABLE)}.")
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        raise ValueError(f"ops must be among {', '.join(OPS)}, got {', '.join(unknown)}.")
    _TABLE[name] = Backend(name, dict(ops), rejects or _rejects_nothing, priority, unavailable or _always_available)
    _resolve.cache_clear()


def unregister_backend(name: str) -> None:
    """Removes a back end that `register_backend` added."""
    if name not in _TABLE:
        raise ValueError(f"name must be a registered back end, got {name!r}. Registered: {', '.join(_TABLE)}.")
    del _TABLE[name]
    _resolve.cache_clear()


def backends() -> dict[str, BackendStatus]:
    """What can run here and why the rest cannot, in the order in which "auto" tries them."""
    status = {}
    for backend in _by_priority():
        reason = backend.unavailable()
        status[backend.name] = BackendStatus(
            backend.name, reason is None, reason or "", tuple(backend.ops), backend.priority
        )
    return status


def select(call: OpCall, name: str) -> Callable[..., Any]:
    """The function that runs `call`: of the back end `name`, or of the first that can for "auto".

    Raises: ValueError for an unknown name; BackendUnavailableError with every rejection and its reason.
    """
    return _resolve(call, name)


@lru_cache(maxsize=1024)
def _resolve(call: OpCall, name: str) -> Callable[..., Any]:
    if name != "auto":
        if name not in _TABLE:
            raise ValueError(f"backend must be 'auto' or one of {', '.join(_TABLE)}, got {name!r}.")
        reason = _rejection(_TABLE[name], call)
        if reason is None:
            return _TABLE[name].ops[call.op]
        others = ", ".join(
            f"{other.name} ({_rejection(other, call) or 'ok'})" for other in _by_priority() if other.name != name
        )
        raise BackendUnavailableError(f"backend {name!r} cannot run {call.op}: {reason}. Tried: {others}.")
    rejected: list[str] = []
    for backend in _by_priority():
        reason = _rejection(backend, call)
        if reason is None:
            _announce(call, backend, rejected)
            return backend.ops[call.op]
        rejected.append(f"{backend.name} ({reason})")
    raise BackendUnavailableError(f"no backend can run {call}. Tried: {', '.join(rejected)}.")


def _rejection(backend: Backend, call: OpCall) -> str | None:
    if call.op not in backend.ops:
        return f"it has no {call.op}"
    return backend.unavailable() or backend.rejects(call)


def _announce(call: OpCall, chosen: Backend, rejected: list[str]) -> None:
    because = f"; not {', '.join(rejected)}" if rejected else ""
    logger.info("backend auto: %s for %s%s", chosen.name, call, because)


def _by_priority() -> list[Backend]:
    return sorted(_TABLE.values(), key=lambda backend: -backend.priority)


def _rejects_nothing(call: OpCall) -> str | None:
    return None


def _always_available() -> str | None:
    return None
