"""What the interpreter cannot show: which instructions compute, and how many bytes one moves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROBES = Path(__file__).with_name("ptx_probes.py")


@pytest.fixture(scope="module")
def ptx():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton"), "PAGEDKV_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, PROBES], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_flushed_or_divided_approximately(ptx):
    for name, instructions in ptx.items():
        assert not [one for one in instructions if {"ftz", "approx", "full"} & set(one.split("."))], name


@pytest.mark.parametrize(
    "name, rounds_by",
    [
        ("bfloat16-to-float8_e4m3fn-128", {"add.f32": 16}),
        ("bfloat16-to-float8_e4m3fn-128-native", {"cvt.rn.satfinite.e4m3x2.f32": 8}),
        ("float16-to-int8-128", {"add.f32": 32}),
    ],
)
def test_scales_and_quotients_are_rounded_once(ptx, name, rounds_by):
    """A thread has 16 elements of one row."""
    instructions = ptx[f"quantize: {name}"]
    assert instructions["div.rn.f32"] == 17
    computes = ("add.f", "sub.f", "mul.f", "fma", "rcp", "cvt.rn")
    assert {one: number for one, number in instructions.items() if one.startswith(computes)} == rounds_by


def test_the_kernels_that_rotate_compute_angles_alike(ptx):
    """Left to the compiler is which products of the series are fused; differently fused, kernels would differ."""
    for name, instructions in ptx.items():
        if name.startswith("rope"):
            num_angles = instructions["cvt.rn.f64.s64"]
            assert (instructions["fma.rn.f64"], instructions["mul.f64"]) == (13 * num_angles, 3 * num_angles), name


def test_tokens_are_moved_in_16_bytes(ptx):
    for name, instructions in ptx.items():
        if name.startswith("store_kv"):
            # Besides, slots are read and claims written.
            moves = {one: number for one, number in instructions.items() if one.startswith(("ld.global", "st.global"))}
            assert set(moves) == {"ld.global.b64", "ld.global.v2.b64", "st.global.b32", "st.global.v2.b64"}, name
            assert moves["ld.global.v2.b64"] == moves["st.global.v2.b64"] == 8, name
