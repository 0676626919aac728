import math

import pytest
import torch

from pagedkv.integrations.flashinfer import rope
from pagedkv.testing.numeric import assert_close_to_oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
INDICES = [torch.int32, torch.int64]
LLAMA31 = {"rope_scale": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}


def frequencies(rotary_dim, theta, scale=1.0, llama31=None):
    """Radians a position of each pair, one after the other in float64; Llama 3.1 by wavelength, as models do it."""
    found = []
    for pair in range(rotary_dim // 2):
        frequency = 1.0 / theta ** (2 * pair / rotary_dim)
        if llama31 is not None:
            factor, low, high = (llama31[name] for name in ("rope_scale", "low_freq_factor", "high_freq_factor"))
            old, wavelength = llama31["old_context_len"], 2 * math.pi / frequency
            if wavelength > old / low:
                frequency /= factor
            elif wavelength >= old / high:
                smooth = (old / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        found.append(frequency / scale)
    return torch.tensor(found, dtype=torch.float64)


def turned(x, cos, sin, interleave, arithmetic):
    """x [nnz, H, D], cos and sin [nnz, n]: column by column."""
    result = x.to(arithmetic).clone()
    pairs = cos.shape[1]
    for pair in range(pairs):
        first, second = (2 * pair, 2 * pair + 1) if interleave else (pair, pair + pairs)
        a, b = x[..., first].to(arithmetic), x[..., second].to(arithmetic)
        c, s = cos[:, pair, None].to(arithmetic), sin[:, pair, None].to(arithmetic)
        result[..., first], result[..., second] = a * c - b * s, b * c + a * s
    return result


def assert_turned(actual, x, positions, speeds, interleave=False):
    angles = positions.double()[:, None] * speeds
    exact, plain = (
        turned(x, angles.cos(), angles.sin(), interleave, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert actual.dtype == x.dtype
    assert_close_to_oracle("x", actual, exact, plain)
    rotary_dim = 2 * speeds.shape[0]
    assert torch.equal(actual[..., rotary_dim:], x[..., rotary_dim:])


def packed(dtype=torch.float32, rows=13, dim=24, heads=(4, 2)):
    """Queries and keys as slices of one packed tensor, with NaN in what lies between."""
    num_q_heads, num_kv_heads = heads
    whole = torch.full((rows, num_q_heads + 2 * num_kv_heads, dim), torch.nan, dtype=dtype)
    q, k = whole[:, :num_q_heads], whole[:, num_q_heads : num_q_heads + num_kv_heads]
    q.copy_(torch.randn(q.shape))
    k.copy_(torch.randn(k.shape))
    return whole, q, k


def requests(dtype=torch.int32):
    """Five requests of 13 rows, two of them empty, and the position of each row, counted one by one."""
    indptr, offsets = [0, 3, 3, 4, 13, 13], [0, 9, 4000, 17, 5]
    positions = [offsets[b] + i for b in range(5) for i in range(indptr[b + 1] - indptr[b])]
    return torch.tensor(indptr, dtype=dtype), torch.tensor(offsets, dtype=dtype), torch.tensor(positions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", INDICES, ids=str)
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 24, 10, 2])
@pytest.mark.parametrize("llama31", [None, LLAMA31], ids=["plain", "llama31"])
def test_all_forms_agree_with_the_definition(dtype, index_dtype, interleave, rotary_dim, llama31):
    indptr, offsets, positions = requests(index_dtype)
    options = {"rotary_dim": rotary_dim, "interleave": interleave, "rope_theta": 500.0}
    options |= {"rope_scale": 3.0} if llama31 is None else llama31
    scale = 3.0 if llama31 is None else 1.0
    speeds = frequencies(rotary_dim or 24, 500.0, scale, llama31)
    name = "apply_rope" if llama31 is None else "apply_llama31_rope"
    for suffix, where in (("", (indptr, offsets)), ("_pos_ids", (positions.to(index_dtype),))):
        whole, q, k = packed(dtype)
        before = whole.clone()
        q_new, k_new = getattr(rope, name + suffix)(q, k, *where, **options)
        assert torch.equal(whole.nan_to_num(), before.nan_to_num()), "the form that returns must not write"
        assert_turned(q_new, q, positions, speeds, interleave)
        assert_turned(k_new, k, positions, speeds, interleave)
        assert getattr(rope, f"{name}{suffix}_inplace")(q, k, *where, **options) is None
        assert torch.equal(q, q_new)
        assert torch.equal(k, k_new)
        assert whole[:, 6:].isnan().all(), "only q and k may be written"


@pytest.mark.parametrize("theta, old_context_len", [(500000.0, 8192), (10000.0, 64)])
def test_llama31_frequencies_are_scaled_by_wavelength(theta, old_context_len):
    llama31 = LLAMA31 | {"old_context_len": old_context_len}
    plain, scaled = frequencies(128, theta), frequencies(128, theta, llama31=llama31)
    kinds = {"kept": (scaled == plain).sum(), "divided": (scaled == plain / 8).sum()}
    kinds["blended"] = 64 - sum(kinds.values())
    assert min(kinds.values()) > 0, f"the case must meet each rule, got {kinds}"
    q, k, positions = torch.randn(40, 2, 128), torch.randn(40, 1, 128), torch.randint(0, 130000, (40,))
    q_new, k_new = rope.apply_llama31_rope_pos_ids(q, k, positions, rope_theta=theta, **llama31)
    assert_turned(q_new, q, positions, scaled)
    assert_turned(k_new, k, positions, scaled)


def test_defaults_are_those_of_flashinfer():
    q, k, positions = torch.randn(5, 2, 64), torch.randn(5, 1, 64), torch.tensor([0, 1, 100, 9000, 70000])
    assert_turned(rope.apply_rope_pos_ids(q, k, positions)[0], q, positions, frequencies(64, 10000.0))
    expected = frequencies(64, 500000.0, llama31=LLAMA31)
    assert_turned(rope.apply_llama31_rope_pos_ids(q, k, positions)[1], k, positions, expected)


@pytest.mark.parametrize("form", ["apply_rope", "apply_llama31_rope"])
def test_rows_beyond_indptr_stay_as_they_are(form):
    _, q, k = packed()
    q[10:] = torch.nan
    q[11], k[12] = torch.inf, -torch.inf
    before_q, before_k = q.clone(), k.clone()
    indptr, offsets = torch.tensor([0, 4, 10]), torch.tensor([2, 3])
    q_new, k_new = getattr(rope, form)(q, k, indptr, offsets)
    getattr(rope, form + "_inplace")(q, k, indptr, offsets)
    for new, before in ((q_new, before_q), (k_new, before_k), (q, before_q), (k, before_k)):
        assert torch.equal(new[10:].view(torch.int32), before[10:].view(torch.int32))
        assert not torch.equal(new[:10], before[:10])


@pytest.mark.parametrize("num_requests", [0, 3])
def test_no_rows(num_requests):
    q, k = torch.randn(0, 4, 8), torch.randn(0, 2, 8)
    indptr, offsets = torch.zeros(num_requests + 1, dtype=torch.int32), torch.zeros(num_requests, dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int32)
    results = [rope.apply_rope(q, k, indptr, offsets), rope.apply_llama31_rope_pos_ids(q, k, none)]
    results.append(rope.apply_rope_with_cos_sin_cache(none, q, k, 8, torch.zeros(4, 8)))
    for q_new, k_new in results:
        assert (q_new.shape, k_new.shape) == (q.shape, k.shape)
    rope.apply_rope_inplace(q, k, indptr, offsets)
    rope.apply_rope_with_cos_sin_cache_inplace(none, q.flatten(1), k.flatten(1), 8, torch.zeros(4, 8))
    quantised = rope.rope_quantize_fp8(q, k, None, None, torch.zeros(4, 8), none)
    assert [tuple(part.shape) for part in quantised] == [(0, 4, 8), (0, 2, 8), (0, 4, 0), (0, 2, 0)]


@pytest.mark.parametrize(
    "form", ["apply_rope", "apply_rope_inplace", "apply_llama31_rope", "apply_llama31_rope_inplace"]
)
@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"indptr": torch.tensor([0, 3, 14])}, ValueError, "indptr must rise from 0 to at most 13 .*got"),
        ({"indptr": torch.tensor([0, 14, 13])}, ValueError, "indptr must rise"),
        ({"indptr": torch.tensor([1, 3, 13])}, ValueError, "indptr must rise from 0"),
        ({"indptr": torch.tensor([0, 13])}, ValueError, r"indptr must have shape \[B \+ 1\].*got \[2\] and \[2\]"),
        ({"indptr": torch.tensor([0.0, 3.0, 13.0])}, ValueError, "indptr must have dtype int32 or int64, got float32"),
        ({"offsets": torch.tensor([0.0, 3.0])}, ValueError, "offsets must have dtype int32 or int64, got float32"),
        ({"offsets": [0, 1]}, TypeError, "offsets must be a tensor, got list"),
        ({"rotary_dim": 7}, ValueError, r"rotary_dim must be even and between 2 and 24 \(D of q\), got 7"),
        ({"rotary_dim": 26}, ValueError, "rotary_dim must be even and between 2 and 24"),
        ({"rotary_dim": 0}, ValueError, "rotary_dim must be even"),
        ({"k": torch.zeros(12, 2, 24)}, ValueError, r"k must have shape \[nnz, Hk, D\] with nnz = 13"),
        ({"k": torch.zeros(13, 2, 22)}, ValueError, "k must have shape"),
        ({"k": torch.zeros(13, 2, 24, dtype=torch.int32)}, TypeError, "k must have dtype"),
        ({"q": torch.zeros(13, 24)}, ValueError, r"q must have shape \[nnz, Hq, D\]"),
        ({"rope_theta": 0.0}, ValueError, "theta must be finite and positive"),
    ],
)
def test_misuse_is_refused_before_anything_is_written(form, change, error, match):
    whole, q, k = packed()
    arguments = {"q": q, "k": k, "indptr": torch.tensor([0, 3, 13]), "offsets": torch.tensor([7, 8])} | change
    before = whole.clone()
    with pytest.raises(error, match=match):
        getattr(rope, form)(**arguments)
    assert torch.equal(whole.nan_to_num(), before.nan_to_num())


def test_expanded_keys_are_refused_before_queries_are_written():
    q, positions = torch.randn(3, 2, 8), torch.arange(3)
    before = q.clone()
    with pytest.raises(ValueError, match="k must not be expanded"):
        rope.apply_rope_pos_ids_inplace(q, torch.randn(3, 1, 8).expand(3, 2, 8), positions)
    with pytest.raises(ValueError, match="key must not be expanded"):
        rope.apply_rope_with_cos_sin_cache_inplace(
            positions, q, torch.randn(3, 1, 8).expand(3, 2, 8), 8, torch.randn(4, 8)
        )
    assert torch.equal(q, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", INDICES, ids=str)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [24, 10])
@pytest.mark.parametrize("flat", [True, False])
def test_a_table_of_cosines_and_sines(dtype, index_dtype, is_neox, rotary_dim, flat):
    # No rotation: whatever the table says is what counts.
    table, positions = torch.randn(50, rotary_dim), torch.randint(0, 50, (13,), dtype=index_dtype)
    whole, q, k = packed(dtype)
    rows = whole.flatten(1)
    query, key = (rows[:, : 4 * 24], rows[:, 4 * 24 : 6 * 24]) if flat else (q, k)
    cos, sin = table[positions.long()].split(rotary_dim // 2, dim=1)
    expected = [[turned(x, cos, sin, not is_neox, a) for a in (torch.float64, torch.float32)] for x in (q, k)]
    results = rope.apply_rope_with_cos_sin_cache(positions, query, key, 24, table, is_neox)
    for result, given, (exact, plain) in zip(results, (query, key), expected, strict=True):
        assert (result.shape, result.dtype) == (given.shape, given.dtype)
        assert_close_to_oracle("x", result.view(exact.shape), exact, plain)
        assert torch.equal(result.view(exact.shape)[..., rotary_dim:], given.view(exact.shape)[..., rotary_dim:])
    assert rope.apply_rope_with_cos_sin_cache_inplace(positions, query, key, 24, table, is_neox) is None
    assert torch.equal(query, results[0])
    assert torch.equal(key, results[1])
    assert whole[:, 6:].isnan().all(), "only query and key may be written"


def test_a_table_of_the_angles_is_the_rotation():
    q, k, positions = torch.randn(9, 2, 16), torch.randn(9, 1, 16), torch.tensor([0, 5, 3, 3, 99, 1, 2, 50, 98])
    angles = torch.outer(torch.arange(100).double(), frequencies(16, 10000.0))
    table = torch.cat((angles.cos(), angles.sin()), dim=1).float()
    for is_neox in (True, False):
        by_table = rope.apply_rope_with_cos_sin_cache(positions, q, k, 16, table, is_neox)
        by_angle = rope.apply_rope_pos_ids(q, k, positions, interleave=not is_neox)
        assert torch.equal(by_table[0], by_angle[0])
        assert torch.equal(by_table[1], by_angle[1])


@pytest.mark.parametrize("suffix", ["", "_inplace"])
@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"positions": torch.tensor([0, 1, 4])}, ValueError, r"positions must be in \[0, 4\) .*got 4"),
        ({"positions": torch.tensor([0, -1, 3])}, ValueError, r"positions must be in \[0, 4\) .*got -1"),
        ({"positions": torch.tensor([0, 1])}, ValueError, r"positions must have shape \[nnz\] with nnz = 3"),
        ({"positions": torch.ones(3)}, ValueError, "positions must have dtype int32 or int64, got float32"),
        ({"cos_sin_cache": torch.zeros(4, 8).half()}, ValueError, "cos_sin_cache must have dtype float32, got float16"),
        ({"cos_sin_cache": torch.zeros(4, 10)}, ValueError, "cos_sin_cache must have an even number of columns"),
        ({"cos_sin_cache": torch.zeros(4, 7)}, ValueError, r"even number of columns, 2 to 8 \(D\), got 7"),
        ({"cos_sin_cache": torch.zeros(4)}, ValueError, "cos_sin_cache must have shape"),
        ({"head_size": 6}, ValueError, r"query must have shape .* head_size = 6, got \[3, 16\]"),
        ({"head_size": 0}, ValueError, "query must have shape"),
        ({"key": torch.zeros(3, 12)}, ValueError, r"key must have shape .*got \[3, 12\]"),
        ({"key": torch.zeros(2, 8)}, ValueError, "key must have shape .*nnz = 3"),
        ({"key": None}, TypeError, "key must be a tensor, got NoneType"),
    ],
)
def test_misuse_of_the_table_is_refused_before_anything_is_written(suffix, change, error, match):
    arguments = {
        "positions": torch.tensor([0, 1, 3]),
        "query": torch.randn(3, 16),
        "key": torch.randn(3, 8),
        "head_size": 8,
        "cos_sin_cache": torch.randn(4, 8),
    } | change
    before = arguments["query"].clone()
    with pytest.raises(error, match=match):
        getattr(rope, f"apply_rope_with_cos_sin_cache{suffix}")(**arguments)
    assert torch.equal(arguments["query"], before)


def parts_for_float8(dtype, latent):
    heads = () if latent else (2,)
    shapes = (11, 4, 8), (11, *heads, 8), (11, 4, 20), (11, *heads, 20)
    return [torch.randn(shape).to(dtype) * 3 for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("latent", [True, False])
def test_float8_parts_are_the_turned_parts_scaled_and_rounded(dtype, float8, is_neox, latent):
    parts, table, positions = parts_for_float8(dtype, latent), torch.randn(30, 8), torch.randint(0, 30, (11,))
    call = rope.mla_rope_quantize_fp8 if latent else rope.rope_quantize_fp8
    results = call(*parts, table, positions, is_neox, float8, 0.5, 100.0)
    cos, sin = table[positions].split(4, dim=1)
    for index, (part, result) in enumerate(zip(parts, results, strict=True)):
        scale, largest = (0.5, 100.0)[index % 2], torch.finfo(float8).max
        exact = part.double()
        if index < 2:
            rows = part.view(11, -1, part.shape[-1])
            exact = turned(rows, cos, sin, not is_neox, torch.float64).view(part.shape)
        exact = (exact * scale).clamp(-largest, largest)
        assert (result.dtype, result.shape) == (float8, part.shape)
        # Half a unit of the last place of a float8, or of its smallest number, plus the float32 arithmetic before it:
        # a few roundings of sums of two products.
        unit = exact.abs() * torch.finfo(float8).eps / 2
        allowed = unit.clamp(min=torch.finfo(float8).smallest_normal * torch.finfo(float8).eps / 2)
        arithmetic = 8 * torch.finfo(torch.float32).eps * float(exact.abs().max())
        assert ((result.double() - exact).abs() <= allowed + arithmetic).all()


def test_float8_is_cut_to_the_largest_number_and_keeps_nan():
    big = torch.tensor([1e6, -1e6, torch.inf, -torch.inf, torch.nan, 1.0]).view(1, 1, 6)
    rows = torch.zeros(1, 1, 2)
    table = torch.tensor([[1.0, 0.0]])
    for float8, largest in ((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)):
        _, _, q_nope, k_nope = rope.rope_quantize_fp8(
            rows, rows, big, big, table, torch.tensor([0]), quantize_dtype=float8, quant_scale_kv=2.0
        )
        assert q_nope.float().flatten()[[0, 1, 2, 3, 5]].tolist() == [largest, -largest, largest, -largest, 1.0]
        assert k_nope.float().flatten()[5] == 2.0
        assert q_nope.float().flatten()[4].isnan()


def test_float8_results_given_are_written_and_decide_the_dtype():
    parts, table, positions = parts_for_float8(torch.float16, False), torch.randn(30, 8), torch.randint(0, 30, (11,))
    expected = rope.rope_quantize_fp8(*parts, table, positions, quantize_dtype=torch.float8_e5m2)
    # Slices of wider rows, as a packed result has them.
    q_out, k_out = (torch.zeros(11, heads, 28, dtype=torch.float8_e5m2) for heads in (4, 2))
    outs = [q_out[..., :8], k_out[..., :8], q_out[..., 8:], k_out[..., 8:]]
    names = ["q_rope_out", "k_rope_out", "q_nope_out", "k_nope_out"]
    results = rope.rope_quantize_fp8(*parts, table, positions, **dict(zip(names, outs, strict=True)))
    for result, out, same in zip(results, outs, expected, strict=True):
        assert result is out
        assert torch.equal(out.view(torch.uint8), same.view(torch.uint8))
    assert rope.rope_quantize_fp8(*parts, table, positions)[0].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    "change, match",
    [
        ({"quantize_dtype": torch.int8}, "quantize_dtype must be float8_e4m3fn or float8_e5m2, got torch.int8"),
        ({"cos_sin_cache": torch.zeros(30, 6)}, r"cos_sin_cache must have 8 columns \(R\), got 6"),
        ({"k_rope": torch.zeros(11, 2, 6)}, "k_rope must have shape"),
        ({"k_nope": torch.zeros(10, 2, 20)}, "k_nope must have shape"),
        ({"pos_ids": torch.full((11,), 30)}, r"pos_ids must be in \[0, 30\)"),
        ({"k_nope_out": torch.zeros(11, 2, 19).to(torch.float8_e4m3fn)}, "k_nope_out must have shape"),
        ({"k_nope_out": torch.zeros(11, 2, 20).to(torch.float8_e5m2)}, "k_nope_out must have dtype float8_e4m3fn"),
    ],
)
def test_misuse_of_float8_is_refused_before_anything_is_written(change, match):
    q_rope, k_rope, q_nope, k_nope = parts_for_float8(torch.float32, False)
    out = torch.zeros(11, 4, 8).to(torch.float8_e4m3fn)
    arguments = {"q_rope": q_rope, "k_rope": k_rope, "q_nope": q_nope, "k_nope": k_nope}
    arguments |= {"cos_sin_cache": torch.randn(30, 8), "pos_ids": torch.arange(11), "q_rope_out": out} | change
    with pytest.raises(ValueError, match=match):
        rope.rope_quantize_fp8(**arguments)
    assert not out.float().any()
