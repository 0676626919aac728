"""Caches of float8: codes and scales bit for bit against the rule, written out in numpy's float32 and in float64."""

import numpy as np
import pytest
import torch
from infiniop_worlds import pools, tokens

from pagedkv.integrations import infiniop
from pagedkv.integrations.infiniop.float8_rows import Float8Scratch, quantize_rows
from pagedkv.testing.bits import same_bits, storage_bytes

F8 = torch.float8_e4m3fn
NAN = 0x7F

# Every magnitude that a code below NaN stands for, from the format: 4 bits of exponent, 3 of mantissa.
_CODES = np.arange(NAN)
_EXPONENT, _MANTISSA = _CODES >> 3, _CODES & 7
VALUES = np.where(_EXPONENT == 0, _MANTISSA / 8 * 2.0**-6, (1 + _MANTISSA / 8) * 2.0 ** (_EXPONENT - 7.0))


def encoded(x):
    """uint8 codes of float32 numbers: the nearest value, of two the one with an even code; NaN beyond 464."""
    magnitude = np.abs(x.astype(np.float64))
    above = np.searchsorted(VALUES, magnitude).clip(0, NAN - 1)
    below = (above - 1).clip(0)
    to_above, to_below = np.abs(VALUES[above] - magnitude), np.abs(magnitude - VALUES[below])
    nearest = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    nearest = np.where(np.isnan(magnitude) | (magnitude > 464), NAN, nearest)
    return np.where(np.signbit(x) & (nearest != NAN), nearest | 0x80, nearest).astype(np.uint8)


def quantised_by_rule(x):
    """codes as [..., D] uint8, all NaN as 0x7f, and scales [...] float32."""
    rows = x.float().numpy()
    one = np.float32(1)
    with np.errstate(all="ignore"):
        amax = np.abs(rows).max(-1)
        scales = np.where(amax == 0, one, amax / np.float32(448)).astype(np.float32)
        return encoded(rows * (one / scales)[..., None]), torch.from_numpy(scales)


def quantised(x):
    scratch = [torch.empty(shape, dtype=dtype) for shape, dtype in Float8Scratch.parts(*x.shape)]
    codes, scales = torch.empty(x.shape, dtype=F8), torch.empty(x.shape[:2])
    quantize_rows(x, codes, scales, Float8Scratch(*scratch))
    return codes_of(codes), scales


def codes_of(codes):
    codes = codes.contiguous().view(torch.uint8).numpy()
    return np.where(codes & 0x7F == NAN, NAN, codes)


def all_numbers(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def test_the_oracle_knows_the_format():
    assert VALUES[-1] == 448
    assert VALUES[1] == 2.0**-9
    finite = torch.arange(NAN, dtype=torch.uint8).view(F8).double().numpy()
    assert np.array_equal(VALUES, finite)
    assert encoded(np.float32([464, 464.5, -1e9, np.nan, 2**-10, 3 * 2**-10, -0.0])).tolist() == [
        *(0x7E, NAN, NAN, NAN, 0, 2, 0x80)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes_of_every_number_under_every_kind_of_scale(dtype):
    numbers = all_numbers(dtype)
    numbers = numbers[numbers.isfinite()]
    finite_rows = [numbers[numbers.float().abs() <= float(amax)] for amax in (1.0, 448.0, 0.3, 3e4, 1e-3)]
    for row, amax in zip(finite_rows, (1.0, 448.0, 0.3, 3e4, 1e-3), strict=True):
        x = torch.cat([row, torch.tensor([amax], dtype=dtype)])[None, None]
        codes, scales = quantised(x)
        expected_codes, expected_scales = quantised_by_rule(x)
        assert same_bits(scales, expected_scales)
        assert np.array_equal(codes, expected_codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_alone_and_beside_others(dtype):
    numbers = all_numbers(dtype)
    for x in (numbers[:, None, None], torch.stack([numbers, numbers.roll(77), numbers * 0.37], 1)[:, None]):
        codes, scales = quantised(x)
        expected_codes, expected_scales = quantised_by_rule(x)
        assert same_bits(scales.nan_to_num(-1.0), expected_scales.nan_to_num(-1.0))
        assert np.array_equal(codes, expected_codes)


def test_ties_go_to_even_codes_and_the_reciprocal_is_what_counts():
    x = torch.randn(2000, 3, 64).bfloat16()
    codes, scales = quantised(x)
    expected_codes, expected_scales = quantised_by_rule(x)
    assert same_bits(scales, expected_scales)
    assert np.array_equal(codes, expected_codes)
    by_division = encoded((x.float() / scales[..., None]).numpy())
    assert (codes != by_division).any()  # or this test would not tell the two rules apart


def test_rows_of_zeros_infinity_and_nan():
    row = torch.tensor([0.0, -0.0, 0.0, 0.0])
    inf = torch.tensor([1.0, torch.inf, -2.0, 0.0])
    nan = torch.tensor([1.0, torch.nan, -2.0, 0.0])
    codes, scales = quantised(torch.stack([row, inf, nan])[None].half())
    assert scales[0, :2].tolist() == [1.0, torch.inf]
    assert scales[0, 2].isnan()
    assert codes[0].tolist() == [[0, 0x80, 0, 0], [0, NAN, 0x80, 0], [NAN] * 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("token_form", ["contiguous", "packed_qkv", "strided_rows"])
@pytest.mark.parametrize("pool_form", ["hnd", "permuted_nhd", "strided_rows", "wide"])
def test_codes_and_scales_go_to_their_slots_and_nothing_else(pool_form, token_form, dtype):
    caches = [cache.to(F8) for cache in pools(pool_form, 5, 3, 4, 8, 6, torch.float16)]
    if pool_form == "permuted_nhd":
        caches = [cache.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) for cache in caches]
    scales = [torch.randn(5, 4, 3).transpose(1, 2), torch.randn(5, 3, 9)[..., ::2][..., :4]]
    k, v = tokens(token_form, 7, 3, 8, 6, dtype)
    slots = torch.tensor([19, 3, -1, 0, 3, -9, 11])
    expected_codes = [cache.clone() for cache in caches]
    expected_scales = [scale.clone() for scale in scales]
    for rows, codes, factors in zip((k, v), expected_codes, expected_scales, strict=True):
        new_codes, new_scales = quantised_by_rule(rows)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                at = (slot // 4, slice(None), slot % 4)
                codes.view(torch.uint8)[(*at, slice(0, rows.shape[2]))] = torch.from_numpy(new_codes[token])
                factors[at] = new_scales[token]
    infiniop.paged_caching(*caches, k, v, slots, *scales)
    assert all(map(same_bits, caches, expected_codes))
    assert all(map(same_bits, scales, expected_scales))


def test_padding_alone_and_no_tokens_write_neither_codes_nor_scales():
    caches = torch.randn(2, 3, 2, 4, 8).to(F8)
    scales = torch.randn(2, 3, 2, 4)
    before = storage_bytes(caches, scales)
    for num_tokens in (0, 3):
        rows = torch.randn(2, num_tokens, 2, 8).half()
        infiniop.paged_caching(*caches, *rows, torch.full((num_tokens,), -1), *scales)
    assert same_bits(storage_bytes(caches, scales), before)


def test_heads_without_elements_have_the_scale_of_zeros():
    caches = torch.zeros(3, 2, 4, 8).to(F8), torch.zeros(3, 2, 4, 0).to(F8)
    scales = torch.zeros(2, 3, 2, 4)
    infiniop.paged_caching(*caches, torch.ones(1, 2, 8).half(), torch.ones(1, 2, 0).half(), torch.tensor([6]), *scales)
    assert scales[1, 1, :, 2].tolist() == [1.0, 1.0]
    assert scales[1].sum() == 2.0
