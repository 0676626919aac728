"""The process that compiles: it must not have TRITON_INTERPRET, which Triton reads once. Prints a line of JSON each."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Compiles the variants of the modules for the targets, in this order, but not those that are finished."""
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--finished", type=json.loads, default=[])
    options = parser.parse_args(arguments)
    found = [(name, variant) for module in options.modules for name, variant in _variants(module)]
    for target in options.targets:
        for module, variant in found:
            name = variant if isinstance(variant, str) else variant.name
            key = [module, name, target]
            if json.dumps(key) in options.finished:
                continue
            _say({"started": key})
            _say({"module": module, "variant": name, "target": target, **_compiled(variant, target)})


def _variants(name: str) -> Iterator[tuple[str, Any]]:
    """Module and variant; instead of a variant the traceback of a module that has none to give, though it should."""
    try:
        module = _module(name)
        modules = [name] if not hasattr(module, "__path__") else _submodules(module)
    except Exception:  # noqa: BLE001 - code under test
        yield name, traceback.format_exc(limit=-2)
        return
    for each in modules:
        try:
            module = _module(each)
            variants = module.compile_variants() if hasattr(module, "compile_variants") else []
        except Exception:  # noqa: BLE001 - code under test
            yield each, traceback.format_exc(limit=-2)
            continue
        label = module.__name__
        names = [variant.name for variant in variants]
        for twice in sorted({one for one in names if names.count(one) > 1}):
            yield label, f"two variants have the name {twice!r}"
        yield from ((label, variant) for variant in variants)


def _submodules(package: ModuleType) -> list[str]:
    return [found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    stem = Path(name).stem
    if stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(stem, name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[stem] = module
        spec.loader.exec_module(module)
    return sys.modules[stem]


def _compiled(variant: Any, target: str) -> dict[str, Any]:
    if isinstance(variant, str):
        return {"problem": variant.strip()}
    if target in variant.left_out:
        return {"left_out": variant.left_out[target]}
    started = time.perf_counter()
    said: list[str] = []
    try:
        with _standard_error(said):
            figures = _figures(_compile(variant, target), target)
    except Exception as error:  # noqa: BLE001 - the compiler's verdict on code under test
        words = f"{type(error).__name__}: {error}"
        words = words if len(words) <= 1500 else f"{words[:700]} ... {words[-700:]}"
        return {"problem": f"{words} {' '.join(said)[:700]}".strip()}
    return {**figures, "seconds": time.perf_counter() - started}


@contextmanager
def _standard_error(said: list[str]) -> Iterator[None]:
    """Within it, what C++ says of a failure goes to `said`, without the dumps of whole programs."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
            said += [line.strip() for line in lines if "error:" in line or "failed" in line or "Assertion" in line]


def _compile(variant: Any, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, _, arch = target.partition(":")
    gpu = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    names = list(variant.kernel.arg_names)
    constexprs = dict(variant.constexprs)
    strangers = sorted({*variant.signature, *constexprs, *variant.aligned} - set(names))
    missing = [name for name in names if name not in variant.signature and name not in constexprs]
    if strangers or missing:
        raise ValueError(f"the kernel has no parameter {strangers}; without a type or a value are {missing}")
    signature = {name: "constexpr" if name in constexprs else variant.signature[name] for name in names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(names)
        if name in variant.aligned and name not in constexprs
    }
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(
        source, target=gpu, options={"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    )


def _figures(kernel: Any, target: str) -> dict[str, int]:
    """Registers, spilled bytes and shared memory, without a driver: as the compilers wrote them down."""
    shared = int(kernel.metadata.shared)
    if target.startswith("hip:"):
        text = kernel.asm["amdgcn"]
        return {
            "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
            "spilled_bytes": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
            "shared_bytes": shared,
        }
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    # A thread has a stack where registers are spilled, and nowhere else in a kernel of Triton.
    spilled = _number(r"STACK:(\d+)", done.stdout) + _number(r"LOCAL:(\d+)", done.stdout)
    return {"registers": _number(r"REG:(\d+)", done.stdout), "spilled_bytes": spilled, "shared_bytes": shared}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:300]!r}")
    return int(found[1])


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # what compilers leave running must not hold the process
