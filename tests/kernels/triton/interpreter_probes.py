"""What the interpreter makes of a few kernels: `python interpreter_probes.py bare|corrected` prints a word for each.

"right", "wrong: ..." with what came out, or "raises: ...". Warnings are errors, as in the tests.
"""

import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

if sys.argv[1] == "corrected":
    import pagedkv.kernels.triton.runtime  # noqa: F401


@triton.jit
def multiply(A, B, Out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(Out + at, tl.dot(tl.load(A + at), tl.load(B + at), input_precision="ieee"))


@triton.jit
def convert(Source, Target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Target + at, tl.load(Source + at).to(Target.dtype.element_ty))


@triton.jit
def count(Number, Out):
    steps = 0
    for _ in range(tl.load(Number)):
        steps += 1
    tl.store(Out, steps)


@triton.jit
def subtract(Source, Out, N: tl.constexpr):
    x = tl.load(Source + tl.arange(0, N))
    tl.store(Out + tl.arange(0, N), x - x)


@triton.jit
def largest(Source, Out, N: tl.constexpr):
    rows = tl.load(Source + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(Out + tl.arange(0, N), tl.max(rows, 1))


@triton.jit
def limit(Source, Out, N: tl.constexpr):
    x = tl.load(Source + tl.arange(0, N))
    tl.store(Out + tl.arange(0, N), tl.minimum(tl.maximum(x, 0.0), 5.0))


def dot_of_bfloat16():
    a, b = torch.randint(-9, 9, (2, 16, 16)).bfloat16()
    out = torch.zeros(16, 16)
    multiply[(1,)](a, b, out, 16)
    return out, a.float() @ b.float()


def converted(numbers, dtype):
    """Four numbers and any others that the dtypes hold, subnormal ones of float8 among them."""
    source = torch.cat([torch.tensor(numbers), torch.randn(128) * 30, torch.randn(124) * 0.002])
    out = torch.zeros(256, dtype=dtype)
    convert[(1,)](source, out, 256)
    return out.float(), source.to(dtype).float()


def read_codes(dtype):
    codes = torch.arange(256).to(torch.uint8).view(dtype)
    out = torch.zeros(256)
    convert[(1,)](codes, out, 256)
    return out, codes.float()


def loop():
    out = torch.zeros(1, dtype=torch.int32)
    count[(1,)](torch.tensor([3], dtype=torch.int32), out)
    return out, torch.tensor([3], dtype=torch.int32)


def infinity_less_infinity():
    out = torch.zeros(2)
    subtract[(1,)](torch.full((2,), torch.inf), out, 2)
    return out, torch.full((2,), torch.nan)


def maximum_beside_nan():
    nan = torch.nan
    out = torch.zeros(2)
    largest[(1,)](torch.tensor([[nan, 3.0], [nan, nan]]), out, 2)
    return out, torch.tensor([3.0, nan])


def larger_of_nan_and_a_number():
    out = torch.zeros(4)
    limit[(1,)](torch.tensor([torch.nan, -1.0, 3.0, 7.0]), out, 4)
    return out, torch.tensor([0.0, 0.0, 3.0, 5.0])


PROBES = {
    "dot of bfloat16": dot_of_bfloat16,
    # Two that a cut would leave at 1, two halfway between neighbours.
    "float32 to bfloat16": lambda: converted(
        [1 + 3 * 2**-9, 1 + 2**-8 + 2**-12, 1 + 2**-8, 1 + 3 * 2**-8], torch.bfloat16
    ),
    "float32 to float8_e4m3fn": lambda: converted([31.7, -0.49, 17.0, 19.0], torch.float8_e4m3fn),
    "float32 to float8_e5m2": lambda: converted([31.7, -0.49, 9.0, 11.0], torch.float8_e5m2),
    "NaN of float8_e4m3fn": lambda: read_codes(torch.float8_e4m3fn),
    "NaN of float8_e5m2": lambda: read_codes(torch.float8_e5m2),
    "loop to a loaded number": loop,
    "infinity less infinity": infinity_less_infinity,
    "maximum beside NaN": maximum_beside_nan,
    "larger of NaN and a number": larger_of_nan_and_a_number,
}


def judged(probe):
    try:
        out, expected = probe()
    except Exception as error:  # noqa: BLE001
        return f"raises: {error}"
    differ = ~((out == expected) | (out.isnan() & expected.isnan()))
    return f"wrong: {out[differ].tolist()[:4]} instead of {expected[differ].tolist()[:4]}" if differ.any() else "right"


if __name__ == "__main__":
    warnings.simplefilter("error")
    print(json.dumps({name: judged(probe) for name, probe in PROBES.items()}))
