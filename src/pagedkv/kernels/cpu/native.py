"""Finds and loads the native core: one shared library an instruction set, the best this CPU has."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (its OpenMP runtime must be mapped first: the core then shares torch's thread pool)

from ...errors import BackendUnavailableError

__all__ = ["available_isas", "core", "core_isa", "unavailable"]

# Best first, but AVX2 before AVX-512 where 512 bits run as two halves. A library of this list that was not built, or
# that the CPU cannot run, is passed over.
_X86_ISAS = ("avx512bf16", "avx512", "avx2", "baseline")
_ARM_ISAS = ("neon",)
_HOW_TO_GET_IT = "install a C++17 compiler and reinstall: pip install --force-reinstall --no-deps pagedkv"


def unavailable() -> str | None:
    """Why there is no native core here, or None. Missing, not switched off, it is also worth one warning."""
    if os.environ.get("PAGEDKV_NATIVE") == "0":
        return "PAGEDKV_NATIVE is 0"
    if _libraries() and not _has_binding():
        return "apache-tvm-ffi is not installed"
    if not _libraries():
        _warn_missing()
        return f"the native core is not installed ({_HOW_TO_GET_IT})"
    if not available_isas():
        built = ", ".join(sorted(set(_libraries()) - {"cpuinfo"}))
        return f"this CPU runs none of the instruction sets that were built ({built})"
    return None


@functools.cache
def core() -> Any:
    """The native functions of the best instruction set; PAGEDKV_CPU_ISA forces one.

    Raises: BackendUnavailableError when there is no core, or not the one that is forced.
    """
    isa = core_isa()
    return _load(_libraries()[isa])


@functools.cache
def core_isa() -> str:
    """The instruction set that `core` uses."""
    reason = unavailable()
    if reason is not None:
        raise BackendUnavailableError(f"backend 'cpu' cannot load: {reason}.")
    runnable = available_isas()
    forced = os.environ.get("PAGEDKV_CPU_ISA")
    if forced:
        if forced not in runnable:
            raise BackendUnavailableError(
                f"PAGEDKV_CPU_ISA must be built and run by this CPU ({', '.join(runnable)}), got {forced!r}."
            )
        return forced
    return runnable[0]


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Instruction sets that were built and that this CPU runs, best first."""
    libraries = _libraries()
    if not libraries or not _has_binding():
        return ()
    probe = _load(libraries["cpuinfo"])
    runnable = [isa for isa in _candidates() if isa in libraries and probe.cpu_supports(isa)]
    if probe.cpu_halves_512():
        runnable.sort(key=lambda isa: isa != "avx2")
    return tuple(runnable)


@functools.cache
def _libraries() -> dict[str, Path]:
    """Instruction set -> library, plus "cpuinfo", which every CPU can load; empty without a native core."""
    suffix = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
    found: dict[str, Path] = {}
    for root in sys.modules[__name__.partition(".")[0]].__path__:
        for path in (Path(root) / "_native").glob(f"*pagedkv_*{suffix}"):
            found[path.stem.split("pagedkv_", 1)[1]] = path
    return found if "cpuinfo" in found else {}


@functools.cache
def _has_binding() -> bool:
    return importlib.util.find_spec("tvm_ffi") is not None


def _load(library: Path) -> Any:
    import tvm_ffi  # here, so that the package runs on a machine that has neither it nor the core

    return tvm_ffi.load_module(str(library))


def _candidates() -> tuple[str, ...]:
    return _ARM_ISAS if platform.machine().lower() in ("arm64", "aarch64") else _X86_ISAS


@functools.cache
def _warn_missing() -> None:
    warnings.warn(
        f"pagedkv runs without its native core, on plain torch, many times slower. To get it, {_HOW_TO_GET_IT}",
        RuntimeWarning,
        stacklevel=2,
    )
