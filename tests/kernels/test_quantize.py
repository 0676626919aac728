"""quantize_kv: each row to its nearest codes, the same bits on every back end and instruction set."""

import pytest
import torch
import tvm_ffi

import pagedkv
from pagedkv.kernels.cpu import native
from pagedkv.testing.bits import same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TARGETS = [torch.int8, torch.float8_e4m3fn]
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def isas():
    """Those that are in use; without the native core none."""
    return native.available_isas() if native.unavailable() is None else ()


def grid(dtype):
    """All finite values of the dtype with their codes, in ascending order; of the two zeros, +0."""
    codes = torch.arange(-127, 128, dtype=torch.int8) if dtype == torch.int8 else torch.arange(256).to(torch.uint8)
    values = codes.view(dtype).double()
    kept = values.isfinite() & ((values != 0) | (codes == 0))
    order = values[kept].argsort()
    return values[kept][order], codes[kept][order]


def nearest(x, dtype):
    """The nearest value of the dtype; of two equally near the one whose code is even. In float64, from a table."""
    values, codes = grid(dtype)
    above = torch.searchsorted(values, x.double()).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = (values[above] - x).abs(), (values[below] - x).abs()
    takes_above = (to_above < to_below) | ((to_above == to_below) & (codes[above] % 2 == 0))
    return torch.where(takes_above, values[above], values[below])


def hard_numbers(dtype):
    """Rows of every value of the grid and every middle of two, and the floats next to them, with the largest value."""
    values, _ = grid(dtype)
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    assert torch.equal(exact.double(), torch.cat([values, (values[1:] + values[:-1]) / 2]))
    up, down = (torch.nextafter(exact, torch.full_like(exact, limit)) for limit in (torch.inf, -torch.inf))
    inside = torch.cat([exact, up, down]).clamp(-LARGEST[dtype], LARGEST[dtype])
    inside = torch.cat([inside, torch.zeros(-len(inside) % 62)]).view(-1, 62)
    largest = torch.full((len(inside), 1), LARGEST[dtype])
    return torch.cat([largest, inside, -largest], 1)[:, None]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_quantize_kv_rounds_to_the_nearest_code_and_ties_to_even(target, any_backend):
    x = hard_numbers(target)
    values, scales = pagedkv.quantize_kv(x, target, backend=any_backend)
    assert torch.equal(scales, torch.ones_like(scales))
    assert torch.equal(values.double(), nearest(x, target))
    if target.is_floating_point:
        assert torch.equal(values.float().signbit(), x.signbit())


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 65, 128, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_quantize_kv_is_the_formula_row_by_row(target, dtype, dim, any_backend):
    fused = torch.randn(5, 3 * dim + 2).to(dtype) * 3
    x = fused[:, 1 : 1 + 3 * dim].view(5, 3, dim)
    values, scales = pagedkv.quantize_kv(x, target, backend=any_backend)
    assert values.is_contiguous()
    assert scales.is_contiguous()
    for token in range(5):
        for head in range(3):
            row = x[token, head].float()
            scale = row.abs().max() / torch.tensor(LARGEST[target])
            assert same_bits(scales[token, head], scale)
            assert torch.equal(values[token, head].double(), nearest(row / scale, target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_int8_row_is_off_by_half_a_step_at_most(dtype, any_backend):
    x = (torch.randn(9, 2, 64) * torch.logspace(-6, 4, 9)[:, None, None]).to(dtype)
    quantized = pagedkv.quantize_kv(x, torch.int8, backend=any_backend)
    step = quantized.scales[..., None].double()
    read = quantized.values.double() * step
    rounding = torch.finfo(torch.float32).eps * LARGEST[torch.int8]
    assert bool(((read - x.double()).abs() <= step * (0.5 + rounding)).all())


def special_rows():
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    rows = [[0.0, -0.0, 0.0], [1.0, torch.nan, 2.0], [torch.inf, 1.0, 0.0], [-torch.inf, torch.nan, 0.0]]
    rows += [[1e-45, -1e-45, 0.0], [tiny, -tiny / 2, tiny * 3], [huge, -huge, huge / 4], [-4.0, 1e-30, 0.0]]
    return torch.tensor(rows)[:, None]


@pytest.mark.parametrize("dim", [3, 64, 67])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_quantize_kv_of_zeros_nan_and_the_ends_of_the_range(target, dim, any_backend):
    x = torch.cat([special_rows(), torch.zeros(8, 1, dim - 3)], -1)
    values, scales = pagedkv.quantize_kv(x, target, backend=any_backend)
    largest, tiny = LARGEST[target], torch.finfo(torch.float32).tiny
    # Both sides tensors: a number divided by a tensor is multiplied by the reciprocal.
    huge, four = torch.tensor([torch.finfo(torch.float32).max, 4.0]) / torch.tensor(largest)
    expected = torch.tensor([1.0, torch.nan, torch.nan, torch.nan, tiny, tiny, huge, four])
    assert same_bits(scales[:, 0], expected)
    read = values.float()[:, 0, :3]
    assert read[:5].count_nonzero() == 0
    assert read[5].tolist() == [1.0, 0.0 if target == torch.int8 else -0.5, 3.0]
    assert read[6].tolist() == [largest, -largest, float(nearest(torch.tensor(largest / 4), target))]
    assert read[7].tolist() == [-largest, 0.0, 0.0]
    assert bool(pagedkv.dequantize_kv(values, scales)[1:4].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_of_a_short_dtype_makes_its_row_nan(bad, dtype, any_backend):
    x = torch.full((2, 2, 40), torch.finfo(dtype).max, dtype=dtype)
    x[1, 0, 37] = bad
    values, scales = pagedkv.quantize_kv(x, torch.int8, backend=any_backend)
    assert scales.isnan().tolist() == [[False, False], [True, False]]
    assert values.float().mean(-1).tolist() == [[127, 127], [0, 127]]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_instruction_set_gives_the_bits_of_the_reference(target, dtype, isa):
    core = tvm_ffi.load_module(str(native._libraries()[isa]))
    random = torch.randn(40, 1, 64) * torch.logspace(-40, 30, 40)[:, None, None]
    special = torch.cat([special_rows(), torch.zeros(8, 1, 61)], -1)
    x = torch.cat([hard_numbers(target), random, special]).to(dtype)
    for dim in (64, 61):
        expected = pagedkv.quantize_kv(x[..., :dim], target, backend="reference")
        values, scales = torch.empty_like(expected.values), torch.empty_like(expected.scales)
        core.quantize_kv(x[..., :dim], values, scales, 1)
        assert same_bits(values, expected.values)
        assert same_bits(scales, expected.scales)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_quantize_kv_of_many_tokens_with_any_number_of_threads(num_threads, any_backend):
    torch.set_num_threads(num_threads)
    x = torch.randn(801, 4, 96).bfloat16()
    values, scales = pagedkv.quantize_kv(x, torch.int8, backend=any_backend)
    one_by_one = [pagedkv.quantize_kv(row[None], torch.int8, backend="reference") for row in x[::50]]
    assert same_bits(values[::50], torch.cat([row.values for row in one_by_one]))
    assert same_bits(scales[::50], torch.cat([row.scales for row in one_by_one]))


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8), (3, 2, 0)], ids=str)
def test_quantize_kv_of_nothing(shape, any_backend):
    values, scales = pagedkv.quantize_kv(torch.empty(shape), torch.int8, backend=any_backend)
    assert values.shape == shape
    assert torch.equal(scales, torch.ones(shape[:2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_dequantize_kv_multiplies_and_rounds_once(target, dtype):
    values, scales = pagedkv.quantize_kv(torch.randn(4, 3, 10), target)
    read = pagedkv.dequantize_kv(values, scales, dtype)
    exact = values.double() * scales[..., None].double()
    assert same_bits(read, exact.float().to(dtype))


REFUSED = {
    "two dims": ({"x": torch.zeros(3, 8)}, ValueError, r"x must have shape \[T, Hk, D\], got \[3, 8\]"),
    "integers": (
        {"x": torch.zeros(3, 1, 8, dtype=torch.int8)},
        TypeError,
        "x must have dtype float32 or float16 or bfloat16, got int8",
    ),
    "a strided last dim": (
        {"x": torch.zeros(3, 1, 8)[..., ::2]},
        ValueError,
        "x must have a contiguous last dimension",
    ),
    "float8_e5m2": (
        {"dtype": torch.float8_e5m2},
        ValueError,
        "dtype must be int8 or float8_e4m3fn, got float8_e5m2",
    ),
    "a dtype by name": ({"dtype": "int8"}, TypeError, "dtype must be a torch.dtype, got str"),
    "no tensor": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    "a gradient": ({"x": torch.zeros(3, 1, 8, requires_grad=True)}, ValueError, "x must not require a gradient"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_quantize_kv_refuses(case, any_backend):
    changed, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        pagedkv.quantize_kv(**{"x": torch.zeros(3, 1, 8), "dtype": torch.int8, **changed}, backend=any_backend)


DEQUANTIZE_REFUSED = {
    "float values": ({"values": torch.zeros(3, 1, 8)}, TypeError, "values must have dtype int8 or float8_e4m3fn, got"),
    "scales of another shape": (
        {"scales": torch.ones(3, 2)},
        ValueError,
        r"scales must have shape \[T, Hk\] with T = 3 .*Hk = 1 .*, got \[3, 2\]",
    ),
    "scales in float64": (
        {"scales": torch.ones(3, 1).double()},
        TypeError,
        "scales must have dtype float32, got float64",
    ),
    "another device": (
        {"scales": torch.ones(3, 1, device="meta")},
        ValueError,
        "scales must be on cpu like values, got meta",
    ),
    "a gradient": (
        {"scales": torch.ones(3, 1, requires_grad=True)},
        ValueError,
        "scales must not require a gradient",
    ),
    "to int8": (
        {"dtype": torch.int8},
        ValueError,
        "dtype must be float32 or float16 or bfloat16, got int8",
    ),
}


@pytest.mark.parametrize("case", DEQUANTIZE_REFUSED)
def test_dequantize_kv_refuses(case):
    changed, error, message = DEQUANTIZE_REFUSED[case]
    good = {"values": torch.zeros(3, 1, 8, dtype=torch.int8), "scales": torch.ones(3, 1)}
    with pytest.raises(error, match=message):
        pagedkv.dequantize_kv(**{**good, **changed})


def test_quantize_kv_op_is_registered_and_compiles():
    x = torch.randn(3, 2, 20)
    torch.library.opcheck(torch.ops.pagedkv.quantize_kv.default, (x, torch.float8_e4m3fn, "auto"))
    codes = torch.zeros(3, 2, 20, dtype=torch.int8)
    torch.library.opcheck(torch.ops.pagedkv.dequantize_kv.default, (codes, torch.ones(3, 2), torch.float16))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def there_and_back(x):
        return pagedkv.dequantize_kv(*pagedkv.quantize_kv(x, torch.int8))

    assert same_bits(there_and_back(x), pagedkv.dequantize_kv(*pagedkv.quantize_kv(x, torch.int8)))
