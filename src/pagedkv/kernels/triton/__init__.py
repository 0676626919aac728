"""The GPU back end, for NVIDIA and AMD: Triton kernels, each in the file of its op.

Triton is imported at the first call, so that `import pagedkv` stays light. With TRITON_INTERPRET=1 in the environment
before that, the kernels run in Triton's interpreter, on CPU tensors, slowly: that is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..backend import OpCall, register_backend

__all__ = ["module_for", "register"]

# As it was at the import: what the table says of this back end must not change while the process runs.
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICE_TYPE = "cpu" if _IS_INTERPRETED else "cuda"
_CHANGED = "TRITON_INTERPRET was changed between the imports of Triton and of pagedkv"

_OPS = (
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

# Ops whose file has another name.
_FILES = {"quantize_kv": "quantize", "apply_rope": "rope"}


def register() -> None:
    """Adds the back end "triton": first on a GPU, and last of all where it is interpreted."""
    register_backend(
        "triton",
        ops={op: _loaded_at_first_call(op) for op in _OPS},
        rejects=_rejects,
        priority=-200 if _IS_INTERPRETED else 10,
        unavailable=_unavailable,
    )


def module_for(device: torch.device, name: str) -> Any | None:
    """The file `name` of this back end, which loads Triton, or None on a device that it does not serve."""
    serves = device.type == _DEVICE_TYPE and _is_installed() and _is_as_imported()
    return importlib.import_module(f".{name}", __name__) if serves else None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_as_imported() -> bool:
    """Whether Triton, which this loads, found TRITON_INTERPRET as this file did."""
    runtime = importlib.import_module(".runtime", __name__)
    return bool(runtime.IS_INTERPRETED == _IS_INTERPRETED)


def _unavailable() -> str | None:
    if not _is_installed():
        return "triton is not installed (pip install triton)"
    if "triton" in sys.modules and not _is_as_imported():
        return _CHANGED
    if not _IS_INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU here, and TRITON_INTERPRET is not 1"
    return None


def _rejects(call: OpCall) -> str | None:
    if call.device_type != _DEVICE_TYPE:
        return f"tensors are on {call.device_type}"
    return None


def _loaded_at_first_call(op: str) -> Callable[..., None]:
    functions: list[Callable[..., None]] = []

    def run(*args: Any) -> None:
        if not functions:
            if not _is_as_imported():
                raise RuntimeError(f"{_CHANGED}.")
            functions.append(getattr(importlib.import_module(f".{_FILES.get(op, op)}", __name__), op))
        functions[0](*args)

    return run
