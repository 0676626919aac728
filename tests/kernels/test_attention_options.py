"""What options do to a call: rotation, scales, the dtype of the result; and how they travel through torch ops."""

import dataclasses
import math

import pytest
import torch

import pagedkv
from pagedkv import ExpTable, Llama31Scaling, RotaryEmbedding
from pagedkv.kernels.attention_options import AttentionRequest
from pagedkv.testing.attention_batch import attention_batch
from pagedkv.testing.numeric import assert_attention_close

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
LLAMA31 = RotaryEmbedding(64, 500000.0, llama31=Llama31Scaling(old_context_len=100))


def test_rotated_keys_in_the_cache_give_what_rope_gives(any_backend):
    """The cache of most engines holds rotated keys: rope= over the keys before rotation is the same attention."""
    batch = attention_batch([1, 12, 5], [40, 33, 2], page_size=1, rope=LLAMA31)
    seq_lens, q_lens = batch.plan.seq_lens.tolist(), batch.plan.query_indptr.diff().tolist()
    of_rows = [torch.arange(kv_len - q_len, kv_len) for q_len, kv_len in zip(q_lens, seq_lens, strict=True)]
    of_keys = torch.cat([torch.arange(kv_len) for kv_len in seq_lens])
    order = batch.table.indices.long()
    key_pages = batch.key_pages.clone()
    key_pages[order] = pagedkv.apply_rope(key_pages[order, 0], of_keys, LLAMA31)[:, None]
    rotated = dataclasses.replace(
        batch, query=pagedkv.apply_rope(batch.query, torch.cat(of_rows), LLAMA31), key_pages=key_pages, options={}
    )
    pages = batch.key_pages, batch.value_pages
    assert_attention_close(rotated.run(backend=any_backend), batch.query, *pages, batch.plan, rope=LLAMA31)


@pytest.mark.parametrize("sink", [-200.0, -1e30, 200.0])
def test_a_row_without_keys_has_the_sink_for_its_lse(sink, any_backend):
    table = pagedkv.PageTable.from_rows([[], [1]], seq_lens=[0, 3], page_size=4)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    mask = torch.tensor([False, False, False])
    for options in ({}, {"custom_mask": mask}):
        plan = pagedkv.plan_attention(starts, table, num_q_heads=1, num_kv_heads=1, head_dim=8, **options)
        pages = torch.ones(2, 4, 1, 8)
        state = pagedkv.paged_attention(
            torch.ones(2, 1, 8), pages, pages, plan, sinks=torch.tensor([sink]), return_lse=True, backend=any_backend
        )
        num_without = 2 if options else 1
        assert (state.out[:num_without] == 0).all()
        assert (state.lse[:num_without] == torch.tensor(sink)).all()
        assert state.out.isfinite().all()


@pytest.mark.parametrize("dtype", [I8, E4M3, E5M2], ids=str)
def test_scales_of_any_strides_in_either_layout(dtype, any_backend):
    batch = attention_batch([1, 12], [40, 33], dtype=dtype, page_size=3)
    expected = batch.run(backend=any_backend)
    pages = [pages.transpose(1, 2).contiguous() for pages in (batch.key_pages, batch.value_pages)]
    scales = {
        name: batch.options[name].permute(2, 0, 1).contiguous().repeat_interleave(3, 2)[:, :, ::3].permute(1, 2, 0)
        for name in ("key_scales", "value_scales")
    }
    assert not scales["key_scales"].is_contiguous()
    other = dataclasses.replace(batch, key_pages=pages[0], value_pages=pages[1], layout="HND")
    state = other.run(backend=any_backend, **scales)
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)


def test_value_scale_leaves_the_lse(any_backend):
    batch = attention_batch([1, 12], [40, 33])
    plain, doubled = (batch.run(backend=any_backend, value_scales=scale) for scale in (1.0, 2.0))
    assert torch.equal(doubled.lse, plain.lse)
    assert torch.equal(doubled.out, 2.0 * plain.out)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_a_visible_nan_of_float8_is_not_hidden(dtype, any_backend):
    batch = attention_batch([1, 12], [40, 40], dtype=dtype)
    batch.value_pages.view(I8)[int(batch.table.indices[0]), 3, :, 5] = 0x7F
    state = batch.run(backend=any_backend)
    assert state.out[0, :, 5].isnan().all()
    assert state.out[0, :, :5].isfinite().all()
    assert state.out[1:].isfinite().all()


def test_a_visible_nan_scale_is_not_hidden(any_backend):
    batch = attention_batch([1, 12], [40, 40], dtype=I8)
    batch.options["key_scales"][int(batch.table.indices[0]), 1, 3] = math.nan
    state = batch.run(backend=any_backend)
    assert state.out[0, 2:].isnan().all()
    assert state.out[0, :2].isfinite().all()
    assert state.out[1:].isfinite().all()


def as_e4m3(batch):
    return {"key_pages": batch.key_pages.to(E4M3), "value_pages": batch.value_pages.to(E4M3)}


MISUSE = {
    "softmax-name": (
        lambda batch: {"softmax": "table"},
        ValueError,
        "softmax must be 'exact', 'lut' or an ExpTable, got 'table'",
    ),
    "softmax-type": (
        lambda batch: {"softmax": 1024},
        TypeError,
        "softmax must be 'exact', 'lut' or an ExpTable, got int",
    ),
    "out-dtypes": (
        lambda b: {"out": torch.zeros(5, 4, 64), "out_dtype": F16},
        TypeError,
        "out must have dtype float16, got float32",
    ),
    "out-dtype-int": (
        lambda b: {"out_dtype": I8},
        ValueError,
        "out_dtype must be float32 or float16 or bfloat16, got int8",
    ),
    "out-dtype-type": (lambda b: {"out_dtype": "f"}, TypeError, r"out_dtype must be a torch\.dtype or None, got str"),
    "int8-without-scales": (
        lambda b: {"key_pages": b.key_pages.to(I8), "value_pages": b.value_pages.to(I8)},
        ValueError,
        "key_scales must be given for int8 pages, got None",
    ),
    "int8-without-value-scales": (
        lambda b: {"key_pages": b.key_pages.to(I8), "value_pages": b.value_pages.to(I8), "key_scales": 1.0},
        ValueError,
        "value_scales must be given for int8 pages, got None",
    ),
    "scales-of-floats": (
        lambda b: {"value_scales": torch.ones(6, 2, 16)},
        ValueError,
        "value_scales must be a float or None for float32 pages, got a tensor",
    ),
    "scales-nan": (lambda b: {"key_scales": math.nan}, ValueError, "key_scales must be a finite float32, got nan"),
    "scales-type": (lambda b: {"key_scales": [1.0]}, TypeError, "key_scales must be a number, got list"),
    "scales-product": (
        lambda b: {"key_scales": 1e30, "sm_scale": 1e30},
        ValueError,
        r"sm_scale \* key_scales must be a finite float32, got",
    ),
    "scales-shape": (
        lambda b: {**as_e4m3(b), "key_scales": torch.ones(6, 16, 2)},
        ValueError,
        r"key_scales must have shape \[N, Hk, P\] with N = 6 \(set by key_pages\), Hk = 2 .*, got \[6, 16, 2\]",
    ),
    "scales-dtype": (
        lambda b: {**as_e4m3(b), "value_scales": torch.ones(6, 2, 16).half()},
        TypeError,
        "value_scales must have dtype float32, got float16",
    ),
    "scales-device": (
        lambda b: {**as_e4m3(b), "value_scales": torch.ones(6, 2, 16, device="meta")},
        ValueError,
        "value_scales must be on cpu like key_pages, got meta",
    ),
    "rope-type": (lambda b: {"rope": 10000.0}, TypeError, "rope must be a RotaryEmbedding, got float"),
    "rope-dim": (
        lambda b: {"rope": RotaryEmbedding(66)},
        ValueError,
        r"rope\.dim must be at most 64 \(head_dim of the plan\), got 66",
    ),
    "scales-overlap": (
        lambda b: {
            **as_e4m3(b),
            "key_scales": (scales := torch.ones(5 * 4 * 64))[: 6 * 2 * 16].view(6, 2, 16),
            "out": scales.view(5, 4, 64),
        },
        ValueError,
        "out must not overlap key_scales, got memory that both use",
    ),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_refused(misuse):
    change, error, words = MISUSE[misuse]
    batch = attention_batch([1, 4], [20, 30])
    arguments = {"query": batch.query, "key_pages": batch.key_pages, "value_pages": batch.value_pages}
    with pytest.raises(error, match=words):
        pagedkv.paged_attention(**{**arguments, **change(batch)}, plan=batch.plan)


REQUESTS = {
    "none": AttentionRequest(),
    "tensors": AttentionRequest(None, 0.0, *torch.ones(2, 4), None, *torch.ones(2, 3, 2, 16)),
    "numbers": AttentionRequest(0.3, 2.0, key_scales=0.5, value_scales=2.0, out_dtype=F32),
    "zeros": AttentionRequest(0.0, 0.0, key_scales=0.0, value_scales=0.0, out_dtype=BF16),
    "tensor-and-number": AttentionRequest(key_scales=torch.ones(3, 2, 16), value_scales=2.0),
    "rope": AttentionRequest(rope=RotaryEmbedding(8)),
    "exp-table": AttentionRequest(softmax=ExpTable(100, 5.0)),
    "exp-table-and-rope": AttentionRequest(rope=LLAMA31, softmax=ExpTable()),
    "rope-llama31": AttentionRequest(0.5, rope=LLAMA31, out_dtype=F16),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_unpack_gives_what_was_packed(name):
    request = REQUESTS[name]
    for before, after in zip(request, AttentionRequest.unpack(*request.pack()), strict=True):
        assert after is before or after == before


def test_request_names_every_option_that_may_be_a_tensor():
    assert list(REQUESTS["tensors"].tensors()) == ["sinks", "alibi_slopes", "key_scales", "value_scales"]
    assert all(tensor is not None for tensor in REQUESTS["tensors"].tensors().values())


@pytest.mark.parametrize(
    "q_lens, kv_lens, num_rows", [([1], [5], 5), ([3, 2], [4, 9], 9), ([7], [3], 5), ([9], [0], 10)]
)
def test_rope_table_reaches_every_position(q_lens, kv_lens, num_rows):
    batch = attention_batch(q_lens, kv_lens, head_dim=8)
    options = AttentionRequest(rope=RotaryEmbedding(8)).checked(batch.key_pages, batch.plan)
    assert options.rope_table.shape == (num_rows, 4, 2)
    assert options.rope_table.is_contiguous()


def test_a_scale_that_is_one_number_is_in_sm_scale():
    batch = attention_batch([1], [5])
    options = AttentionRequest(0.5, key_scales=4.0, value_scales=3.0).checked(batch.key_pages, batch.plan)
    assert (options.sm_scale, options.value_scale) == (2.0, 3.0)
    assert options.features() == ["value_scale"]


OF_TRACED_CALLS = {
    "none": ({}, {}),
    "tensors": ({"dtype": I8}, {"sinks": torch.ones(4), "alibi_slopes": torch.ones(4)}),
    "numbers": ({}, {"sm_scale": 0.3, "soft_cap": 2.0, "key_scales": 0.5, "value_scales": 2.0}),
    "lut": ({}, {"softmax": "lut"}),
    "rope": ({}, {"rope": RotaryEmbedding(8, 500.0, 2.0, True, Llama31Scaling()), "out_dtype": BF16}),
}


@pytest.mark.parametrize("case", OF_TRACED_CALLS)
def test_opcheck(case):
    settings, options = OF_TRACED_CALLS[case]
    batch = attention_batch([1, 4], [20, 30], head_dim=8, **settings, **options)
    # opcheck compares inputs before and after, and NaN is not equal to itself.
    pages = [pages.nan_to_num() for pages in (batch.key_pages, batch.value_pages)]
    options = {
        name: value.nan_to_num() if isinstance(value, torch.Tensor) else value for name, value in batch.options.items()
    }
    arguments = batch.query, *pages, *batch.plan.pack(), "NHD", *AttentionRequest(**options).pack(), True, "auto"
    torch.library.opcheck(torch.ops.pagedkv.paged_attention, arguments)


@pytest.mark.parametrize("case", OF_TRACED_CALLS)
def test_compiled_call_gives_the_same_bits(case):
    torch.compiler.reset()  # each case compiles `step` anew, and there is a limit on how often
    settings, options = OF_TRACED_CALLS[case]
    batch = attention_batch([1, 4], [20, 30], head_dim=8, **settings, **options)
    pages = batch.key_pages, batch.value_pages

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, out=None):
        return pagedkv.paged_attention(query, *pages, batch.plan, return_lse=True, out=out, **batch.options)

    compiled, eager, out = step(batch.query), batch.run(), torch.empty_like(batch.run().out)
    assert torch.equal(compiled.out, eager.out)
    assert torch.equal(compiled.lse, eager.lse)
    assert step(batch.query, out).out is out
    assert torch.equal(out, eager.out)
