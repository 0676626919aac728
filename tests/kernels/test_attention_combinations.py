"""Every option of paged_attention with every other, on each back end that accepts the call."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pagedkv
from pagedkv import ExpTable, Llama31Scaling, RotaryEmbedding
from pagedkv.testing.attention_batch import attention_batch
from pagedkv.testing.numeric import assert_close_to_oracle, attention_oracle, table_errors

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUANTISED = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
DIMS = [(64, 64), (16, 40), (192, 128), (40, 8), (8, 8), (12, 7)]
HEADS = [(1, 1), (2, 1), (2, 2), (1, 3), (1, 8)]
SCALES = {"key_scales": 0.03, "value_scales": 0.5}

some = st.sampled_from


@st.composite
def lengths(draw):
    """(q_len, kv_len) of each sequence: empty ones, without new tokens, with more rows than keys."""
    drawn = draw(st.lists(st.tuples(some([0, 1, 1, 2, 5, 12, 33]), st.integers(0, 40)), max_size=3))
    # One that is always there: over a handful of numbers the largest error of torch, hence what is allowed, may be 0.
    drawn.insert(draw(st.integers(0, len(drawn))), (41, 57))
    return drawn


@st.composite
def ropes(draw, head_dim):
    dim = draw(some(sorted({2, head_dim // 4 * 2, head_dim})))
    llama31 = draw(some([None, Llama31Scaling(old_context_len=16), Llama31Scaling()]))
    return RotaryEmbedding(dim, draw(some([10000.0, 100.0])), draw(some([1.0, 4.0])), draw(st.booleans()), llama31)


@st.composite
def combinations(draw):
    """A seed for random numbers and the arguments of `attention_batch`."""
    sequences = draw(lengths())
    (head_dim, value_dim), (num_kv_heads, group) = draw(some(DIMS)), draw(some(HEADS))
    dtype = draw(some(FLOATS + QUANTISED))
    settings = {
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "page_size": draw(some([1, 3, 16, 32])),
        "dtype": dtype,
        "query_dtype": draw(some(FLOATS)),
        "out_dtype": draw(some([None, *FLOATS])),
        "layout": draw(some(["NHD", "HND"])),
        "form": draw(some(["separate", "interleaved", "page_first", "sliced"])),
        "causal": draw(st.booleans()),
        "window_left": draw(some([-1, -1, 0, 3, 17])),
        "soft_cap": draw(some([0.0, 0.0, 2.5])),
        "sm_scale": draw(some([None, 0.2])),
    }
    if draw(st.booleans()):
        settings["softmax"] = draw(some(["exact", "lut", ExpTable(128, 3.0)]))
    # Each of these is left out as often as it is in, so that no back end is asked for all of them every time.
    if draw(st.booleans()):
        settings["rope"] = draw(ropes(head_dim))
    for name in ("sinks", "alibi_slopes"):
        if draw(st.booleans()):
            settings[name] = torch.linspace(0.0, 1.5, num_kv_heads * group)
    for name, scale in SCALES.items():
        if draw(st.booleans()):
            settings[name] = scale
        elif dtype not in (*FLOATS, torch.int8) and draw(st.booleans()):
            settings[name] = None
    mask_size = sum(q_len * kv_len for q_len, kv_len in sequences) if draw(st.booleans()) else None
    return draw(st.integers(0, 2**32)), sequences, settings, mask_size


def build(seed, sequences, settings, mask_size):
    torch.manual_seed(seed)
    mask = None if mask_size is None else torch.rand(mask_size) < 0.7
    q_lens, kv_lens = zip(*sequences, strict=True)
    return attention_batch(q_lens, kv_lens, custom_mask=mask, **settings)


def test_any_combination_of_options_is_as_exact_as_torch():
    available = [name for name, status in pagedkv.backends().items() if status.available]
    num_accepted = dict.fromkeys(available, 0)

    @given(combinations())
    @settings(max_examples=200, deadline=None, derandomize=True)
    def check(combination):
        batch = build(*combination)
        expected = {**batch.options, "layout": batch.layout}
        out_dtype = expected.pop("out_dtype") or batch.query.dtype
        arguments = batch.query, batch.key_pages, batch.value_pages, batch.plan
        pages = batch.value_pages.transpose(1, 2) if batch.layout == "HND" else batch.value_pages
        by_table = table_errors(expected.pop("softmax", "exact"), pages, expected.get("value_scales"))
        exact = attention_oracle(*arguments, **expected)
        plain = attention_oracle(*arguments, **expected, arithmetic=torch.float32)
        seed = combination[0]
        # Half a second each where a kernel is interpreted.
        for name in available if seed % 4 == 0 else [name for name in available if name != "triton"]:
            try:
                state = batch.run(backend=name)
            except pagedkv.BackendUnavailableError:
                continue
            num_accepted[name] += 1
            assert state.out.dtype == out_dtype
            assert_close_to_oracle(f"out of {name}", state.out, exact.out, plain.out, by_table.out)
            assert_close_to_oracle(f"lse of {name}", state.lse, exact.lse, plain.lse, by_table.lse)

    check()
    assert all(num_accepted.values()), f"accepted calls: {num_accepted}"
