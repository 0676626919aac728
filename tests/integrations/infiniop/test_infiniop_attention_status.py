"""Every way in which the attention operators refuse: the code, the words, and a result that stays as it was."""

import pytest
import torch

from pagedkv.integrations import infiniop
from pagedkv.integrations.infiniop import InfiniopError

F16, F8 = torch.float16, torch.float8_e4m3fn


def arguments(*, prefill=False):
    """Two sequences of three blocks of four: 5 and 12 keys, one row each."""
    given = {
        "out": torch.zeros(2, 4, 6),
        "q": torch.ones(2, 4, 8),
        "k_cache": torch.ones(7, 2, 4, 8),
        "v_cache": torch.ones(7, 2, 4, 6),
        "block_tables": torch.tensor([[3, 1, -1], [0, 6, 2]]),
        "lens": torch.tensor([5, 12]),
    }
    return given | {"cu_seqlens_q": torch.tensor([0, 1, 2])} if prefill else given


def call(given):
    given = dict(given)
    lens = given.pop("lens")
    if "cu_seqlens_q" in given:
        return infiniop.paged_attention_prefill(history_lens=lens, **given)
    return infiniop.paged_attention(cache_lens=lens, **given)


def refused(given, code, words):
    out = given["out"]
    before = out.clone() if isinstance(out, torch.Tensor) and out.device.type == "cpu" else None
    with pytest.raises(InfiniopError, match=words) as error:
        call(given)
    assert error.value.status == code
    if before is not None:
        assert torch.equal(out, before)


def test_the_arguments_are_right_as_they_are():
    for prefill in (False, True):
        assert call(arguments(prefill=prefill)).eq(1).all()


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "block_tables", "lens"])
def test_null_pointer(name, prefill):
    shown = "seq_lens" if name == "lens" else name
    refused(arguments(prefill=prefill) | {name: None}, 4, f"{shown} must be .* got None")
    refused(arguments(prefill=prefill) | {name: 7}, 3, f"{shown} must be .* got int")


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("q", torch.float64, "q must have dtype float16 or bfloat16 or float32"),
        ("out", F16, "out must have dtype float32 like q, got float16"),
        ("k_cache", F16, "k_cache must have dtype float32 or float8_e4m3fn, got float16"),
        ("v_cache", F16, "v_cache must have dtype float32 like k_cache"),
        ("block_tables", torch.int16, "block_tables must have dtype int32 or int64 or uint32, got int16"),
        ("block_tables", torch.int32, "seq_lens must have dtype int32 like block_tables, got int64"),
        ("lens", torch.uint32, "seq_lens must have dtype int64 like block_tables, got uint32"),
    ],
)
def test_bad_dtype(name, dtype, words, prefill):
    given = arguments(prefill=prefill)
    refused(given | {name: given[name].to(dtype)}, 10, words)


def test_bad_dtype_of_starts_and_slopes():
    given = arguments(prefill=True)
    starts = given["cu_seqlens_q"].int()
    refused(given | {"cu_seqlens_q": starts}, 10, "cum_seq_lens_q must have dtype int64 like block_tables, got int32")
    refused(given | {"alibi_slopes": torch.zeros(4).half()}, 10, "alibi_slopes must have dtype float32, got float16")


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("q", (2, 32), "q must have shape"),
        ("q", (2, 4, 7), "D = 7"),
        ("out", (2, 4, 8), r"out must have shape .* Dv = 6 \(set by v_cache\), got \[2, 4, 8\]"),
        ("out", (2, 3, 6), "Hq = 4"),
        ("out", (3, 4, 6), "got .3, 4, 6."),
        ("k_cache", (7, 2, 4, 8, 1), "k_cache must have shape"),
        ("k_cache", (7, 2, 4, 7), "D = 8"),
        ("v_cache", (6, 2, 4, 6), "N = 7"),
        ("v_cache", (7, 4, 4, 6), "Hk = 2"),
        ("v_cache", (7, 2, 5, 6), "P = 4"),
        ("block_tables", (6,), "block_tables must have shape"),
        ("lens", (3,), "seq_lens must have shape"),
        ("alibi_slopes", (3,), "alibi_slopes must have shape .* Hq = 4"),
        ("alibi_slopes", (4, 1), "alibi_slopes must have shape"),
    ],
)
def test_bad_shape(name, shape, words, prefill):
    given = arguments(prefill=prefill)
    dtype = given[name].dtype if name in given else torch.float32
    refused(given | {name: torch.zeros(shape, dtype=dtype)}, 11, words)


def test_heads_that_do_not_divide_and_dims_of_nothing():
    given = arguments()
    three = {"k_cache": torch.ones(7, 3, 4, 8), "v_cache": torch.ones(7, 3, 4, 6)}
    refused(given | three, 11, r"a multiple of 3 \(heads of k_cache\), got 4")
    empty = {"k_cache": torch.ones(7, 2, 0, 8), "v_cache": torch.ones(7, 2, 0, 6)}
    refused(given | empty, 11, "P of q and caches must be at least 1, got 0")


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", ["q", "out", "k_cache", "v_cache"])
def test_strided_rows_are_refused_by_name(name, prefill):
    given = arguments(prefill=prefill)
    strided = given[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    refused(given | {name: strided}, 12, f"{name} must have a contiguous last dimension")


def test_a_result_that_overlaps_itself_or_its_inputs():
    given = arguments()
    refused(given | {"out": torch.zeros(1, 4, 6).expand(2, 4, 6)}, 12, "out must not overlap itself")
    square = {"v_cache": torch.ones(7, 2, 4, 8), "out": given["q"]}
    refused(given | square, 3, "out must not overlap q,")


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("lens", [5, 13], r"seq_lens of sequence 1 must be in 0..12 \(M = 3 blocks of 4\), got 13"),
        ("lens", [-1, 12], "seq_lens of sequence 0 must be in 0..12 .* got -1"),
        ("block_tables", [[3, 1, -1], [0, 7, 2]], r"sequence 1 must name blocks in \[0, 7\), got 7 at column 1"),
        ("block_tables", [[3, -1, 0], [0, 6, 2]], r"sequence 0 must name blocks in \[0, 7\), got -1 at column 1"),
        ("block_tables", [[3, 2**32 + 1, 0], [0, 6, 2]], "got 4294967297 at column 1"),
    ],
)
def test_values_that_reach_beyond_the_pool(name, values, words, prefill):
    refused(arguments(prefill=prefill) | {name: torch.tensor(values)}, 3, words)


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        ([0, 2], r"shape \[S \+ 1\] with S = 2 \(set by block_tables\), got \[2\]"),
        ([1, 1, 2], r"must start with 0, not decrease and end with 2 \(rows of q\), got \[1, 1, 2\]"),
        ([0, 3, 2], "not decrease"),
        ([0, 1, 3], "end with 2"),
    ],
)
def test_starts_that_do_not_divide_the_rows(starts, words):
    refused(arguments(prefill=True) | {"cu_seqlens_q": torch.tensor(starts)}, 3, words)


def test_lengths_of_the_history_alone_are_noticed():
    given = arguments(prefill=True)
    given["cu_seqlens_q"], given["lens"] = torch.tensor([0, 2, 2]), torch.tensor([1, 12])
    refused(given, 3, r"sequence 0 must be at least 2 \(its rows of q\), got 1. It counts all keys")


def test_scales_come_with_float8_caches_and_only_then():
    scales = {"k_scale": torch.ones(7, 2, 4), "v_scale": torch.ones(7, 2, 4)}
    refused(arguments() | scales, 3, "k_scale must be None for float32 caches")
    given = arguments()
    quantised = {"k_cache": given["k_cache"].to(F8), "v_cache": given["v_cache"].to(F8)}
    refused(given | quantised, 3, "k_scale must be given for float8_e4m3fn caches")
    refused(given | quantised | scales | {"v_scale": torch.ones(7, 2, 5)}, 11, "v_scale must have shape")
    assert call(given | quantised | scales).eq(1).all()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, "1", None])
def test_a_scale_must_be_a_number(scale):
    refused(arguments() | {"scale": scale}, 3, "scale must be a")


def test_gradients_and_unknown_back_ends():
    given = arguments()
    refused(given | {"q": given["q"].clone().requires_grad_()}, 3, "q must not require a gradient")
    refused(given | {"backend": "abacus"}, 3, "backend must be 'auto' or one of")
