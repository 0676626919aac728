"""quantize_kv on the Triton back end: bit for bit, by the instruction that rounds to float8 and without it."""

import math

import pytest
import torch

import pagedkv
from pagedkv.kernels.triton import runtime
from pagedkv.kernels.triton.runtime import IS_INTERPRETED
from pagedkv.testing.conformance import ConformanceCase
from pagedkv.testing.conformance.judge import moves_as_reference

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
F32, F16, BF16, I8, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn


@pytest.fixture(params=[False, True], ids=["of bits", "by the instruction"])
def has_e4m3(request, monkeypatch):
    """Whether codes of float8_e4m3fn are made by the instruction; the interpreter has both."""
    if request.param and not IS_INTERPRETED and not runtime.has_e4m3(runtime.target_of(torch.device("cuda"))):
        pytest.skip("needs a GPU that rounds to float8_e4m3fn")
    monkeypatch.setattr(runtime, "has_e4m3", lambda target: request.param)


def assert_as_reference(x, dtype):
    check = moves_as_reference(pagedkv.quantize_kv, lambda: {"x": x, "dtype": dtype})
    ConformanceCase("quantize_kv", "quantize", check)("triton", DEVICE)


def rows_of_scale_one(numbers):
    """[T, 1, 64]: the numbers in rows whose largest is 448, so that quotients are the numbers themselves."""
    rows = torch.zeros(-(-len(numbers) // 63), 64)
    for row, part in zip(rows, numbers.split(63), strict=True):
        row[: len(part)] = part
    rows[:, 63] = 448.0
    return rows[:, None]


def test_every_float8_and_what_lies_between_two_is_rounded_as_torch_does(has_e4m3):
    codes = torch.arange(127).to(torch.uint8).view(E4M3).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([middles.nextafter(torch.tensor(math.inf)), middles.nextafter(torch.tensor(-math.inf))])
    numbers = torch.cat([codes, middles, near])
    assert_as_reference(rows_of_scale_one(torch.cat([numbers, -numbers])), E4M3)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_numbers_of_all_magnitudes_are_rounded_as_torch_does(dtype, has_e4m3):
    x = torch.randn(60, 3, 40) * torch.exp2(torch.randint(-30, 10, (60, 3, 40)).float())
    assert_as_reference(x.to(dtype), E4M3)


def test_every_integer_and_what_lies_between_two_is_rounded_to_even():
    numbers = torch.arange(-126, 127) + torch.tensor([[0.0], [0.5], [0.49999997], [0.50000006]])
    x = torch.cat([numbers.flatten(), torch.zeros(-numbers.numel() % 15)]).view(-1, 1, 15)
    assert_as_reference(torch.cat([x, torch.full((len(x), 1, 1), 127.0)], 2), I8)


@pytest.mark.parametrize("dtype", [I8, E4M3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_spoils_its_row_alone_wherever_it_is(bad, dtype):
    x = torch.randn(33, 2, 17)
    for at in range(17):
        x[at, at % 2, at] = bad
    assert_as_reference(x, dtype)


@pytest.mark.parametrize("dtype", [I8, E4M3])
def test_subnormal_numbers_and_scales_are_not_flushed(dtype):
    tiny = torch.finfo(F32).tiny
    factors = torch.tensor([2**-23, 2**-20, 0.3, 0.5, 1.0, 1.5, 126.0, 127.0, 128.0, 447.0, 448.0, 449.0, 900.0])
    x = torch.stack([factors * (tiny * scale) for scale in (1.0, 1 / 127, 1 / 448, 2**-10)])[:, None]
    assert_as_reference(x, dtype)


@pytest.mark.parametrize("dim", [0, 1, 2, 31, 2048, 3000])
@pytest.mark.parametrize("dtype", [I8, E4M3])
def test_rows_of_any_width(dim, dtype):
    assert_as_reference(torch.randn(5, 3, dim), dtype)


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_rows_that_begin_anywhere_and_overlap_in_memory(offset):
    memory = torch.randn(2000).to(BF16)[offset:]
    assert_as_reference(memory.as_strided((20, 3, 24), (30, 10, 1)), I8)
