"""Every variant of every Triton kernel, compiled for four GPUs that are not here: no spills, no block too large."""

from dataclasses import replace
from pathlib import Path

import pytest

from pagedkv.kernels.backend import OPS
from pagedkv.testing import triton_compile
from pagedkv.testing.triton_compile import KERNELS, TARGETS, compile_variants, refusals

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / "build" / "triton"
PLANTED = str(Path(__file__).with_name("planted_kernels.py"))


@pytest.fixture(scope="module")
def compiled():
    return compile_variants([KERNELS, str(ROOT / "benchmarks" / "gpu_read_kernel.py")], cache_dir=CACHE)


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_fits_and_does_not_spill(compiled, target):
    wrong = refusals(one for one in compiled if one.target == target and one.left_out is None)
    assert not wrong, "\n".join(wrong)


def test_no_variant_is_left_out_for_every_target(compiled):
    assert not [words for words in refusals(compiled) if "is left out for every target" in words]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_variants(compiled, op):
    file = {"quantize_kv": "quantize", "apply_rope": "rope"}.get(op, op)
    modules = {one.module.rpartition(".")[2] for one in compiled}
    assert any(module == file or module.startswith(f"{file}_") for module in modules)


@pytest.fixture(scope="module")
def planted():
    """Of one target a processor, since each process takes seconds to start."""
    return compile_variants([PLANTED], targets=["cuda:80", "hip:gfx942"], cache_dir=CACHE)


@pytest.mark.parametrize(
    "variant, target, words",
    [
        ("spills", "cuda:80", r"spills for cuda:80 spills \d+ bytes a thread, with \d+ registers\."),
        ("much-shared-memory", "cuda:80", "takes 196608 bytes of shared memory, a block may have 166912"),
        ("much-shared-memory", "hip:gfx942", "takes 131072 bytes of shared memory, a block may have 65536"),
        ("broken", "cuda:80", "does not compile: .*there_is_no_such_name is not defined"),
        ("wrong-parameters", "hip:gfx942", r"no parameter \['goal'\]; without a type or a value are \['target', 'n'\]"),
        ("kills", "cuda:80", "does not compile: the compiler ended with signal SIGABRT"),
    ],
)
def test_a_planted_kernel_is_refused(planted, variant, target, words):
    (one,) = [one for one in planted if (one.variant, one.target) == (variant, target)]
    (refusal,) = refusals([one])
    assert refusal.startswith(f"planted_kernels: {variant} for {target} ")
    with pytest.raises(AssertionError, match=f"(?s){words}"):
        raise AssertionError(refusal)


def test_a_harmless_kernel_is_not_refused_and_has_figures(planted):
    (one,) = [one for one in planted if (one.variant, one.target) == ("harmless", "cuda:80")]
    assert not refusals([one])
    assert 4 <= one.registers <= 32
    assert (one.spilled_bytes, one.shared_bytes) == (0, 0)


def test_what_is_left_out_says_why_and_must_compile_somewhere(planted):
    here, there = [one for one in planted if one.variant == "left-out-here"]
    assert (here.target, here.left_out) == ("cuda:80", "it is planted")
    assert there.registers > 0
    everywhere = [replace(here, target=target) for target in TARGETS]
    assert refusals(everywhere) == ["planted_kernels: left-out-here is left out for every target: it is planted"]
    assert not refusals([*everywhere[1:], replace(there, target="cuda:80")])


@pytest.mark.parametrize(
    "planted_for, words",
    [("raises", "this module cannot say what to compile"), ("nothing", "no module has variants to compile")],
)
def test_a_module_that_gives_nothing_to_compile_is_refused(monkeypatch, planted_for, words):
    monkeypatch.setenv("PLANTED", planted_for)
    wrong = refusals(compile_variants([PLANTED], targets=["cuda:90"], cache_dir=CACHE))
    assert len(wrong) == 1
    assert words in wrong[0]


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="targets must be among cuda:80, .*, got cuda:75"):
        compile_variants(targets=["cuda:75"], cache_dir=CACHE)


def test_the_table_shows_figures_reasons_and_refusals(planted, monkeypatch, capsys):
    monkeypatch.setattr(triton_compile, "compile_variants", lambda *args, **options: planted)
    assert triton_compile.main(["--table"]) == 1
    out = capsys.readouterr().out
    assert "planted_kernels: left-out-here       cuda:80       left out: it is planted" in out
    assert "planted_kernels: much-shared-memory for cuda:80 takes 196608 bytes" in out
