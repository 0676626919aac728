import itertools

import pytest
import torch
from batches import DTYPES
from oracle import attend

from pagedkv.integrations.flashinfer import cascade, states
from pagedkv.integrations.flashinfer.cascade import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper,
)
from pagedkv.integrations.flashinfer.utils import get_alibi_slopes

WORKSPACE = torch.empty(1 << 10, dtype=torch.uint8)
Q_LENS = [2, 1, 3, 0, 4]
# Of each level: which sequences stand together, and how many keys they share there.
LEVELS = [([[0, 1, 2, 3, 4]], [19]), ([[0, 1], [2, 3, 4]], [7, 0]), ([[0], [1], [2], [3], [4]], [5, 1, 9, 3, 2])]
KV_HEADS, HEADS, DIM = 2, 4, 32


def assert_near(result, expected, dtype):
    """Against float64. Inputs are exact in dtype; a logit is a sum of DIM products, each addition rounded in float32,
    and the result is rounded once to dtype."""
    tolerance = DIM * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


class Levels:
    """One paged cache, unused slots NaN, and a page table a level over it."""

    def __init__(self, levels, *, page_size=5, dtype=torch.float32, layout="NHD", index_dtype=torch.int32):
        generator = torch.Generator().manual_seed(0)
        self.layout, self.page_size, self.dtype = layout, page_size, dtype
        self.groups = [groups for groups, _ in levels]
        self.starts = [0, *itertools.accumulate(Q_LENS)]
        self.q = torch.randn(sum(Q_LENS), HEADS, DIM, generator=generator).to(dtype)
        pages = [[-(-length // page_size) for length in lens] for _, lens in levels]
        total = sum(map(sum, pages))
        order = torch.randperm(total + 3, generator=generator)[:total]
        self.pages = torch.full((total + 3, 2, page_size, KV_HEADS, DIM), float("nan"), dtype=dtype)
        self.keys = []  # level, part -> [2, length, Hk, D]
        self.qo_indptr, self.kv_indptr, self.kv_indices, self.last_page_len = [], [], [], []
        first = 0
        for (groups, lens), counts in zip(levels, pages, strict=True):
            ids = order[first : first + sum(counts)]
            first += sum(counts)
            rows = [sum(Q_LENS[sequence] for sequence in group) for group in groups]
            self.qo_indptr.append(torch.tensor([0, *itertools.accumulate(rows)], dtype=index_dtype))
            self.kv_indptr.append(torch.tensor([0, *itertools.accumulate(counts)], dtype=index_dtype))
            self.kv_indices.append(ids.to(index_dtype))
            self.last_page_len.append(
                torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in lens], dtype=index_dtype)
            )
            parts = [torch.randn(2, length, KV_HEADS, DIM, generator=generator).to(dtype) for length in lens]
            self.keys.append(parts)
            for part, start in zip(parts, [0, *itertools.accumulate(counts)], strict=False):
                for t in range(part.shape[1]):
                    self.pages[ids[start + t // page_size], :, t % page_size] = part[:, t]
        if layout == "HND":
            self.pages = self.pages.transpose(2, 3).contiguous()

    @property
    def arrays(self):
        return self.qo_indptr, self.kv_indptr, self.kv_indices, self.last_page_len

    def rows(self, sequence):
        return self.q[self.starts[sequence] : self.starts[sequence + 1]]

    def of_sequence(self, level, sequence):
        number = next(i for i, group in enumerate(self.groups[level]) if sequence in group)
        return self.keys[level][number]

    def joined(self, *, causal=False, **options):
        """Attention of each sequence over its keys of all levels as one, causal within the last."""
        outs = []
        for sequence, q_len in enumerate(Q_LENS):
            parts = [self.of_sequence(level, sequence) for level in range(len(self.keys))]
            k, v = torch.cat(parts, 1)
            mask = torch.ones(q_len, k.shape[0], dtype=torch.bool)
            if causal:
                own = parts[-1].shape[1]
                mask[:, k.shape[0] - own :] = torch.ones(q_len, own, dtype=torch.bool).tril(own - q_len)
            outs.append(attend(self.rows(sequence), k, v, mask=mask, **options)[0])
        return torch.cat(outs)

    def by_level(self, **options):
        """Attention over each level on its own, with positions of its own, merged in float64."""
        outs, lses = [], []
        for groups, parts in zip(self.groups, self.keys, strict=True):
            results = [
                attend(torch.cat([self.rows(sequence) for sequence in group]), *part, **options)
                for group, part in zip(groups, parts, strict=True)
            ]
            outs.append(torch.cat([out for out, _ in results]))
            lses.append(torch.cat([lse for _, lse in results]))
        weights = torch.softmax(torch.stack(lses) * torch.log(torch.tensor(2.0, dtype=torch.float64)), 0)
        return (torch.stack(outs) * weights[..., None]).sum(0)


def planned(levels, **options):
    wrapper = MultiLevelCascadeAttentionWrapper(len(levels.keys), WORKSPACE, levels.layout)
    wrapper.plan(*levels.arrays, HEADS, KV_HEADS, DIM, levels.page_size, q_data_type=levels.dtype, **options)
    return wrapper


def some_levels(num_levels, **options):
    return Levels({1: LEVELS[2:], 2: [LEVELS[0], LEVELS[2]], 3: LEVELS}[num_levels], **options)


def test_merges_are_those_of_states():
    assert cascade.merge_state is states.merge_state
    assert cascade.merge_state_in_place is states.merge_state_in_place
    assert cascade.merge_states is states.merge_states


@pytest.mark.parametrize("num_levels", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
def test_levels_are_attention_over_all_their_keys(num_levels, dtype, layout, causal):
    levels = some_levels(num_levels, dtype=dtype, layout=layout)
    out = planned(levels, causal=causal).run(levels.q, levels.pages)
    assert out.dtype == dtype
    assert_near(out, levels.joined(causal=causal), dtype)


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_levels_of_any_page_size_and_index_dtype(page_size, index_dtype):
    levels = some_levels(3, page_size=page_size, index_dtype=index_dtype)
    wrapper = planned(levels, causal=True)
    expected = levels.joined(causal=True)
    assert_near(wrapper.run(levels.q, levels.pages), expected, torch.float32)
    assert_near(wrapper.forward(levels.q, tuple(levels.pages.unbind(1))), expected, torch.float32)


@pytest.mark.parametrize(
    "options, named", [({"logits_soft_cap": 2.0}, {"soft_cap": 2.0}), ({"sm_scale": 0.4}, {"sm_scale": 0.4})]
)
def test_options_of_logits_reach_every_level(options, named):
    levels = some_levels(3)
    out = planned(levels, causal=True, **options).run(levels.q, levels.pages)
    assert_near(out, levels.joined(causal=True, **named), torch.float32)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"window_left": 4}, {"window_left": 4}),
        ({"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 1e3}, {"rope": {"theta": 1e3}}),
        ({"pos_encoding_mode": "ALIBI"}, {"slopes": get_alibi_slopes(HEADS)}),
    ],
)
def test_positions_are_those_of_each_level(options, named):
    # Rows a level has more of than keys stand before 0: with a window some see nothing there.
    levels = some_levels(2)
    out = planned(levels, **options).run(levels.q, levels.pages)
    assert_near(out, levels.by_level(**named), torch.float32)


def test_half_precision_is_rounded_once():
    levels = some_levels(3, dtype=torch.bfloat16)
    exact = some_levels(3, dtype=torch.float32)
    exact.q, exact.pages = levels.q.float(), levels.pages.float()
    result = planned(levels, causal=True).run(levels.q, levels.pages)
    exact_result = planned(exact, causal=True).run(exact.q, exact.pages)
    # Only a tie in float32 may round otherwise; were each level rounded, many results would differ.
    assert (result != exact_result.to(torch.bfloat16)).double().mean() < 0.02


def test_a_batch_without_rows():
    wrapper = MultiLevelCascadeAttentionWrapper(2, None)
    none, empty = torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    wrapper.begin_forward([none] * 2, [none] * 2, [empty] * 2, [empty] * 2, HEADS, KV_HEADS, DIM, 4)
    q = torch.empty(0, HEADS, DIM, dtype=torch.float16)
    assert wrapper.run(q, torch.empty(1, 2, 4, KV_HEADS, DIM, dtype=torch.float16)).shape == (0, HEADS, DIM)
    wrapper.end_forward()


def test_graph_mode_fills_a_buffer_a_level():
    levels = some_levels(2)
    room = [torch.full((40,), -1, dtype=torch.int32) for _ in range(2)]
    buffers = [[torch.empty_like(array) for array in arrays] for arrays in levels.arrays]
    wrapper = MultiLevelCascadeAttentionWrapper(2, WORKSPACE, "NHD", True, buffers[0], buffers[1], room, buffers[3])
    assert wrapper.is_cuda_graph_enabled
    wrapper.plan(*levels.arrays, HEADS, KV_HEADS, DIM, levels.page_size, q_data_type=torch.float32)
    for level in range(2):
        assert torch.equal(buffers[1][level], levels.kv_indptr[level])
        used = levels.kv_indices[level].numel()
        assert torch.equal(room[level][:used], levels.kv_indices[level])
    assert_near(wrapper.run(levels.q, levels.pages), levels.joined(), torch.float32)
    with pytest.raises(ValueError, match="paged_kv_indices_buf_arr must be a list of 2 tensors"):
        MultiLevelCascadeAttentionWrapper(2, WORKSPACE, "NHD", True, buffers[0], buffers[1], None, buffers[3])


def test_what_levels_refuse():
    levels = some_levels(2)
    wrapper = planned(levels)
    out = wrapper.run(levels.q, levels.pages)
    with pytest.raises(ValueError, match="qo_indptr_arr must be a list of 2 tensors .one a level., got 1"):
        wrapper.plan(levels.qo_indptr[:1], *levels.arrays[1:], HEADS, KV_HEADS, DIM, 5)
    fewer = [levels.qo_indptr[0], torch.tensor([0, 1, 2, 3, 4, 5])]
    with pytest.raises(ValueError, match="the same number of rows at every level, got .10, 5."):
        wrapper.plan(fewer, *levels.arrays[1:], HEADS, KV_HEADS, DIM, 5)
    bad = [levels.kv_indices[0], levels.kv_indices[1] - 100]
    with pytest.raises(ValueError, match="page ids of 0 or more"):
        wrapper.plan(*levels.arrays[:2], bad, levels.last_page_len, HEADS, KV_HEADS, DIM, 5)
    assert torch.equal(wrapper.run(levels.q, levels.pages), out), "the plan before stays"
    with pytest.raises(ValueError, match="q must have dtype float32"):
        wrapper.run(levels.q.half(), levels.pages)
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        MultiLevelCascadeAttentionWrapper(2, WORKSPACE).run(levels.q, levels.pages)
    with pytest.raises(ValueError, match="num_levels must be"):
        MultiLevelCascadeAttentionWrapper(0, WORKSPACE)
    with pytest.raises(KeyError, match="kv_layout must be NHD or HND"):
        MultiLevelCascadeAttentionWrapper(1, WORKSPACE, "HDN")


def test_workspaces_of_levels_are_replaced_and_checked():
    wrapper = planned(some_levels(2))
    wrapper.reset_workspace_buffer(WORKSPACE, [WORKSPACE, WORKSPACE])
    with pytest.raises(ValueError, match="int_workspace_buffers must be a list of 2 tensors"):
        wrapper.reset_workspace_buffer(WORKSPACE, [WORKSPACE])
    with pytest.raises(ValueError, match="float_workspace_buffer must be aligned to 16 bytes"):
        wrapper.reset_workspace_buffer(WORKSPACE[1:], [WORKSPACE, WORKSPACE])


def shared_prefix(length, dtype, layout, **options):
    """A level that all share, as packed keys and values, and what each sequence has alone."""
    levels = Levels([([[0, 1, 2, 3, 4]], [length]), LEVELS[2]], dtype=dtype, layout=layout, **options)
    packed = levels.keys[0][0]
    return levels, packed.transpose(1, 2).contiguous() if layout == "HND" else packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("length", [0, 1, 23])
@pytest.mark.parametrize("causal", [False, True])
def test_prefill_with_a_shared_prefix(dtype, layout, length, causal):
    levels, (k, v) = shared_prefix(length, dtype, layout)
    wrapper = BatchPrefillWithSharedPrefixPagedKVCacheWrapper(WORKSPACE, layout)
    wrapper.begin_forward(*(arrays[1] for arrays in levels.arrays), HEADS, KV_HEADS, DIM, levels.page_size)
    out = wrapper.forward(levels.q, k, v, levels.pages, causal=causal)
    assert out.dtype == dtype
    assert_near(out, levels.joined(causal=causal), dtype)
    scaled = wrapper.forward(levels.q, k, v, levels.pages, causal=causal, sm_scale=0.3)
    assert_near(scaled, levels.joined(causal=causal, sm_scale=0.3), dtype)
    wrapper.end_forward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("length", [0, 23])
def test_decode_with_a_shared_prefix(monkeypatch, dtype, layout, length):
    monkeypatch.setattr(f"{__name__}.Q_LENS", [1] * 5)
    monkeypatch.setattr(f"{__name__}.LEVELS", [None, None, (LEVELS[2][0], [5, 0, 16, 1, 2])])
    levels, (k, v) = shared_prefix(length, dtype, layout)
    wrapper = BatchDecodeWithSharedPrefixPagedKVCacheWrapper(WORKSPACE, layout)
    wrapper.begin_forward(*(arrays[1] for arrays in levels.arrays[1:]), HEADS, KV_HEADS, DIM, 5, data_type=dtype)
    out = wrapper.forward(levels.q, k, v, levels.pages)
    assert out.dtype == dtype
    assert_near(out, levels.joined(), dtype)
    wrapper.end_forward()


def test_what_a_shared_prefix_refuses():
    levels, (k, v) = shared_prefix(7, torch.float16, "NHD")
    wrapper = BatchPrefillWithSharedPrefixPagedKVCacheWrapper(WORKSPACE)
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        wrapper.forward(levels.q, k, v, levels.pages)
    wrapper.begin_forward(*(arrays[1] for arrays in levels.arrays), HEADS, KV_HEADS, DIM, levels.page_size)
    with pytest.raises(ValueError, match="q must have shape .T, Hq, D. with T = 10"):
        wrapper.forward(levels.q[1:], k, v, levels.pages)
    with pytest.raises(ValueError, match="v_shared must have shape .Lshared, Hk, D. with Lshared = 7"):
        wrapper.forward(levels.q, k, v[1:], levels.pages)
    with pytest.raises(ValueError, match="k_shared must have shape .Lshared, Hk, D. with Hk = 2"):
        wrapper.forward(levels.q, k[:, :1], v, levels.pages)
    decode = BatchDecodeWithSharedPrefixPagedKVCacheWrapper(WORKSPACE)
    decode.begin_forward(*(arrays[1] for arrays in levels.arrays[1:]), HEADS, KV_HEADS, DIM, 5, data_type="bfloat16")
    with pytest.raises(ValueError, match="keys and values must have dtype bfloat16"):
        decode.forward(levels.q[:5], k, v, levels.pages)


def test_no_buffer_is_written_by_a_plan_that_fails():
    def i32(*numbers):
        return torch.tensor(numbers, dtype=torch.int32)

    buffers = [[torch.full((n,), 99, dtype=torch.int32) for n in sizes] for sizes in ((2, 3), (2, 3), (8, 8), (1, 2))]
    wrapper = MultiLevelCascadeAttentionWrapper(2, None, "NHD", True, *buffers)
    rows, pages, ids = [i32(0, 2), i32(0, 1, 2)], [i32(0, 1), i32(0, 1, 2)], [i32(0), i32(1, 2)]
    for last, words in ((i32(4, 77), "last_page_len of sequence 1"), (i32(4), "indptr must have shape")):
        with pytest.raises(ValueError, match=words):
            wrapper.plan(rows, pages, ids, [i32(4), last], 4, 2, 64, 4)
    assert all(bool((buffer == 99).all()) for level in buffers for buffer in level)
    wrapper.plan(rows, pages, ids, [i32(4), i32(4, 2)], 4, 2, 64, 4)
    assert [buffer.tolist() for buffer in buffers[3]] == [[4], [4, 2]]
    assert wrapper.is_cuda_graph_enabled
