"""Finding and loading the native core: each instruction set, none at all, and the wrong one."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import pagedkv
from pagedkv.kernels import backend as table
from pagedkv.kernels.cpu import native
from pagedkv.testing.bits import same_bits

WITH_CORE = os.environ.get("PAGEDKV_NATIVE") != "0"


@pytest.fixture(autouse=True)
def forget():
    """Every test asks anew, and so does the next one."""
    caches = [
        native.core,
        native.core_isa,
        native.available_isas,
        native._libraries,
        native._warn_missing,
        table._resolve,
    ]

    def clear():
        for cache in caches:
            cache.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.delenv("PAGEDKV_NATIVE", raising=False)
    monkeypatch.setattr(native, "_libraries", dict)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_a_library_everything_runs_on_the_reference_with_one_warning(no_library, smallest_calls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in smallest_calls.values():
            call()
            call()
        status = pagedkv.backends()["cpu"]
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert "without its native core, on plain torch" in str(caught[0].message)
    assert "pip install --force-reinstall" in str(caught[0].message)
    assert not status.available
    assert "is not installed (install a C++17 compiler" in status.reason
    assert native.available_isas() == ()


def test_without_a_library_the_native_core_by_name_is_an_error(no_library, smallest_calls):
    with (
        pytest.warns(RuntimeWarning, match="native core"),
        pytest.raises(
            pagedkv.BackendUnavailableError, match=r"cannot run gather_kv: .*not installed.*reference \(ok\)"
        ),
    ):
        smallest_calls["gather_kv"](backend="cpu")
    with pytest.raises(
        pagedkv.BackendUnavailableError, match="backend 'cpu' cannot load: the native core is not installed"
    ):
        native.core()


def test_switched_off_runs_on_the_reference_without_a_warning(monkeypatch, smallest_calls):
    monkeypatch.setenv("PAGEDKV_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in smallest_calls.values():
            call()
        assert pagedkv.backends()["cpu"].reason == "PAGEDKV_NATIVE is 0"


def test_a_cpu_that_runs_no_built_set_is_told_so(monkeypatch):
    monkeypatch.delenv("PAGEDKV_NATIVE", raising=False)
    monkeypatch.setattr(native, "_libraries", lambda: {"cpuinfo": None, "avx2": None})
    monkeypatch.setattr(native, "available_isas", tuple)
    assert native.unavailable() == "this CPU runs none of the instruction sets that were built (avx2)"


if WITH_CORE:

    @pytest.mark.parametrize("isa", native.available_isas())
    def test_each_instruction_set_moves_the_same_bits(isa, monkeypatch):
        monkeypatch.setenv("PAGEDKV_CPU_ISA", isa)
        assert native.core_isa() == isa
        key, value = torch.randn(2, 2100, 4, 128)  # enough to write past the caches
        slots = torch.randperm(2112)[:2100]
        pages = torch.empty(2, 132, 16, 4, 128)
        pagedkv.store_kv(key, value, *pages, slots, backend="cpu")
        for read, written in zip(pagedkv.gather_kv(*pages, slots, backend="cpu"), (key, value), strict=True):
            assert same_bits(read, written)
        before = pages.clone()
        pagedkv.copy_pages(*pages, torch.arange(70), torch.arange(69, -1, -1), backend="cpu")
        assert same_bits(pages[1, :70], before[0, :70].flip(0))

    def test_memory_that_was_taken_away_is_refused():
        freed = torch.zeros(2, 4, 1, 8)
        freed.untyped_storage().resize_(0)
        key = torch.ones(1, 1, 8)
        with pytest.raises(ValueError, match="tensors must have memory, got one of 64 elements without an address"):
            pagedkv.store_kv(key, key, torch.zeros(2, 4, 1, 8), freed, torch.tensor([0]), backend="cpu")

    def test_the_best_instruction_set_is_the_default(monkeypatch):
        monkeypatch.delenv("PAGEDKV_CPU_ISA", raising=False)
        assert native.core_isa() == native.available_isas()[0]

    def test_a_wrong_instruction_set_is_an_error_that_lists_the_right_ones(monkeypatch, smallest_calls):
        monkeypatch.setenv("PAGEDKV_CPU_ISA", "mmx")
        expected = (
            rf"PAGEDKV_CPU_ISA must be built and run by this CPU \({', '.join(native.available_isas())}\), got 'mmx'"
        )
        with pytest.raises(pagedkv.BackendUnavailableError, match=expected):
            smallest_calls["gather_kv"]()

    def test_a_process_has_one_openmp_runtime_and_the_forced_instruction_set():
        isa = native.available_isas()[-1]
        result = run_python(
            """
            import pathlib, sys
            import pagedkv
            assert "libpagedkv" not in pathlib.Path("/proc/self/maps").read_text(), "loaded before it is needed"
            import torch
            pages = torch.zeros(2, 64, 16, 4, 64)
            pagedkv.store_kv(*torch.ones(2, 900, 4, 64), *pages, torch.arange(900))
            assert pages[:, :56].eq(1).all()
            mapped = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
            print(sorted(path for path in mapped if "gomp" in path or "omp5" in path or "iomp" in path))
            print(sorted(path.rsplit("/", 1)[1] for path in mapped if "libpagedkv" in path))
            """,
            PAGEDKV_CPU_ISA=isa,
        )
        assert result.returncode == 0, result.stderr
        openmp, cores = map(eval, result.stdout.splitlines())
        assert len(openmp) == 1
        assert "libgomp" in openmp[0]
        assert cores == sorted([f"libpagedkv_{isa}.so", "libpagedkv_cpuinfo.so"])
