import math

import pytest
import torch
from batches import DTYPES, LSE_TOLERANCES
from oracle import attend

from pagedkv.integrations.flashinfer.quantization import segment_packbits
from pagedkv.integrations.flashinfer.sparse import (
    BlockSparseAttentionWrapper,
    VariableBlockSparseAttentionWrapper,
    convert_bsr_mask_layout,
)
from pagedkv.integrations.flashinfer.utils import get_alibi_slopes

WORKSPACE = torch.empty(1 << 10, dtype=torch.uint8)
KV_HEADS, DIM = 2, 32


def assert_near(result, expected, dtype):
    """Against float64. Inputs are exact in dtype; a logit is a sum of DIM products, each addition rounded in float32,
    and the result is rounded once to dtype."""
    tolerance = DIM * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def assert_lse(lse, expected):
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, **LSE_TOLERANCES)


class Blocks:
    """A random pattern of blocks [MB, NB]; its last row of blocks is empty."""

    def __init__(self, M, N, R, C, *, group=2, dtype=torch.float32, index_dtype=torch.int32):
        generator = torch.Generator().manual_seed(M * N + R)
        self.sizes, self.dtype, self.heads = (M, N, R, C), dtype, (KV_HEADS * group, KV_HEADS, DIM)
        self.chosen = torch.rand(-(-M // R), N // C, generator=generator) < 0.5
        self.chosen[0] = True
        self.chosen[-1, 1:] = False
        rows, cols = self.chosen.nonzero(as_tuple=True)
        self.indices = cols.to(index_dtype)
        counts = self.chosen.sum(1)
        self.indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(index_dtype)
        self.mask = torch.rand(len(cols), R, C, generator=generator) < 0.6
        self.dense = self.chosen.repeat_interleave(R, 0)[:M].repeat_interleave(C, 1)
        self.masked = torch.zeros_like(self.dense)
        for block, (row, col) in enumerate(zip(rows.tolist(), cols.tolist(), strict=True)):
            height = min(R, M - row * R)
            self.masked[row * R : row * R + height, col * C : (col + 1) * C] = self.mask[block, :height]
        self.q, self.k, self.v = (
            torch.randn(n, heads, DIM, generator=generator).to(dtype)
            for n, heads in ((M, self.heads[0]), (N, KV_HEADS), (N, KV_HEADS))
        )

    @property
    def qkv(self):
        return self.q, self.k, self.v

    def plan(self, **options):
        wrapper = BlockSparseAttentionWrapper(WORKSPACE)
        options = {"q_data_type": self.dtype, "o_data_type": self.dtype, **options}
        wrapper.plan(self.indptr, self.indices, *self.sizes, *self.heads, **options)
        return wrapper

    def gathered(self, **options):
        """Each row of blocks with the keys of its blocks, one block after the other, and positions among these."""
        M, _, R, C = self.sizes
        results = []
        for row, chosen in enumerate(self.chosen):
            keys = chosen.repeat_interleave(C)
            results.append(attend(self.q[row * R : min(M, row * R + R)], self.k[keys], self.v[keys], **options))
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def test_convert_bsr_mask_layout_is_row_by_row():
    mask = torch.arange(4 * 2 * 3).view(4, 2, 3)
    flat = convert_bsr_mask_layout(mask, torch.tensor([0, 1, 1, 4]))
    assert flat[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert flat[6:].tolist() == [6, 7, 8, 12, 13, 14, 18, 19, 20, 9, 10, 11, 15, 16, 17, 21, 22, 23]
    assert convert_bsr_mask_layout(mask[:0], torch.tensor([0])).shape == (0,)
    with pytest.raises(ValueError, match="mask must have indptr.-1. = 3 blocks, got 4"):
        convert_bsr_mask_layout(mask, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="indptr must be a row that starts with 0 and does not decrease"):
        convert_bsr_mask_layout(mask, torch.tensor([0, 5, 4]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("sizes", [(3, 3, 1, 1), (20, 48, 4, 16), (18, 35, 4, 5), (7, 64, 16, 64)])
def test_blocks_are_attention_under_a_mask(dtype, index_dtype, sizes):
    blocks = Blocks(*sizes, dtype=dtype, index_dtype=index_dtype)
    out, lse = blocks.plan().run(*blocks.qkv, return_lse=True)
    expected = attend(*blocks.qkv, mask=blocks.dense)
    assert out.dtype == dtype
    assert_near(out, expected[0], dtype)
    assert_lse(lse, expected[1])


@pytest.mark.parametrize("sizes", [(20, 48, 4, 16), (18, 35, 4, 5), (9, 12, 3, 3)])
@pytest.mark.parametrize("form", ["bool", "packed", "both"])
def test_masks_within_blocks(sizes, form):
    blocks = Blocks(*sizes)
    flat = torch.cat([blocks.masked[row, blocks.dense[row]] for row in range(sizes[0])])
    lens = blocks.dense.sum(1).split(sizes[2])
    indptr = torch.tensor([0, *(int(part.sum()) for part in lens)]).cumsum(0)
    packed = segment_packbits(flat, indptr, "little")[0]
    options = {"bool": {"mask": blocks.mask}, "packed": {"packed_mask": packed}}.get(form)
    options = options or {"mask": torch.ones_like(blocks.mask), "packed_mask": packed}
    expected = attend(*blocks.qkv, mask=blocks.masked)
    out, lse = blocks.plan(causal=True, **options).run(*blocks.qkv, return_lse=True)
    assert_near(out, expected[0], torch.float32)
    assert_lse(lse, expected[1])


@pytest.mark.parametrize(
    "options, named",
    [
        ({"causal": True}, {"causal": True}),
        ({"logits_soft_cap": 2.0}, {"soft_cap": 2.0}),
        ({"sm_scale": 0.4}, {"sm_scale": 0.4}),
        ({"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 1e3}, {"rope": {"theta": 1e3}}),
        ({"pos_encoding_mode": "ALIBI"}, {"slopes": get_alibi_slopes(6)}),
    ],
)
def test_options_follow_positions_within_the_chosen_blocks(options, named):
    blocks = Blocks(18, 35, 4, 5, group=3)
    out, lse = blocks.plan(**options).run(*blocks.qkv, return_lse=True)
    expected = blocks.gathered(**named)
    assert_near(out, expected[0], torch.float32)
    assert_lse(lse, expected[1])


def test_forward_takes_its_own_options():
    blocks = Blocks(20, 48, 4, 16)
    wrapper = blocks.plan(sm_scale=0.9, logits_soft_cap=1.0)
    assert_near(wrapper.forward(*blocks.qkv), blocks.gathered()[0], torch.float32)
    scaled = wrapper.forward(*blocks.qkv, sm_scale=0.4)
    assert_near(scaled, blocks.gathered(sm_scale=0.4)[0], torch.float32)
    wrapper.end_forward()


def test_scales_are_numbers_or_tensors():
    blocks = Blocks(20, 48, 4, 16)
    wrapper = blocks.plan()
    out = wrapper.run(*blocks.qkv, scale_q=2.0, scale_k=torch.tensor([0.25]), scale_v=torch.tensor(4.0))
    expected = blocks.gathered(sm_scale=0.5 / math.sqrt(DIM))[0]
    assert_near(out / 4, expected, torch.float32)
    with pytest.raises(ValueError, match="v_scale must have 1 or . elements"):
        wrapper.run(*blocks.qkv, scale_v=torch.ones(7))


def test_the_output_is_float16_unless_told_otherwise():
    blocks = Blocks(20, 48, 4, 16, dtype=torch.bfloat16)
    wrapper = BlockSparseAttentionWrapper(None)
    wrapper.begin_forward(blocks.indptr, blocks.indices, *blocks.sizes, *blocks.heads, q_data_type="bfloat16")
    out = wrapper.run(*blocks.qkv)
    assert out.dtype == torch.float16
    assert_near(out, blocks.gathered()[0], torch.float16)


@pytest.mark.parametrize("form", ["plain", "by kv head", "by query head"])
@pytest.mark.parametrize("sizes", [(20, 48, 4, 16), (18, 35, 4, 5)])
def test_a_mask_of_blocks_takes_the_place_of_indices(form, sizes):
    blocks = Blocks(*sizes)
    M, _, R, C = sizes
    generator = torch.Generator().manual_seed(7)
    by_head = torch.rand(KV_HEADS, *blocks.chosen.shape, generator=generator) < 0.5
    chosen = {"plain": blocks.chosen, "by kv head": by_head, "by query head": by_head.repeat_interleave(2, 0)}[form]
    wrapper = BlockSparseAttentionWrapper(WORKSPACE)
    types = {"q_data_type": torch.float32, "o_data_type": torch.float32}
    wrapper.plan(None, None, *sizes, *blocks.heads, **types, block_mask=chosen)
    expected = []
    for head in range(blocks.heads[0]):
        pattern = blocks.chosen if form == "plain" else by_head[head // 2]
        dense = pattern.repeat_interleave(R, 0)[:M].repeat_interleave(C, 1)
        of_head = blocks.k[:, head // 2, None], blocks.v[:, head // 2, None]
        expected.append(attend(blocks.q[:, head, None], *of_head, mask=dense))
    out, lse = wrapper.run(*blocks.qkv, return_lse=True)
    assert_near(out, torch.cat([out for out, _ in expected], 1), torch.float32)
    assert_lse(lse, torch.cat([lse for _, lse in expected], 1))
    buffers = torch.full_like(out, math.nan), torch.full_like(lse, math.nan)
    results = wrapper.run(*blocks.qkv, out=buffers[0], lse=buffers[1], return_lse=True)
    assert results[0] is buffers[0]
    assert results[1] is buffers[1]
    assert torch.equal(buffers[0], out)
    assert torch.equal(buffers[1], lse)
    scaled = wrapper.run(*blocks.qkv, scale_v=2.0)
    assert torch.equal(scaled, 2 * out)


def test_results_are_written_in_place():
    blocks = Blocks(20, 48, 4, 16, dtype=torch.float16)
    wrapper = blocks.plan()
    expected = wrapper.run(*blocks.qkv, return_lse=True)
    out, lse = torch.full_like(expected[0], math.nan), torch.full_like(expected[1], math.nan)
    result = wrapper.run(*blocks.qkv, out=out, lse=lse, return_lse=True)
    assert result[0] is out
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    with pytest.raises(ValueError, match="out must have dtype float16, got float32"):
        wrapper.run(*blocks.qkv, out=out.float())
    with pytest.raises(ValueError, match="lse must have shape .20, 4., got .4, 20."):
        wrapper.run(*blocks.qkv, lse=lse.T, return_lse=True)


def test_keys_of_blocks_nobody_sees_are_not_read():
    blocks = Blocks(20, 48, 4, 16)
    wrapper = BlockSparseAttentionWrapper(WORKSPACE)
    types = {"q_data_type": torch.float32, "o_data_type": torch.float32}
    indices = torch.tensor([0, 0, 2, 0, 2, 1])
    wrapper.plan(torch.tensor([0, 1, 3, 3, 4, 5]), indices, *blocks.sizes, *blocks.heads, **types)
    expected = wrapper.run(*blocks.qkv)
    blocks.k[16:32] = blocks.v[16:32] = math.nan
    assert torch.equal(wrapper.run(*blocks.qkv), expected)
    assert expected[8:12].eq(0).all(), "a row of blocks without keys"


def test_packed_slices_need_no_copy_by_the_caller():
    blocks = Blocks(20, 48, 4, 16)
    packed = torch.cat([blocks.k, blocks.v], 2)
    assert torch.equal(
        blocks.plan().run(blocks.q, packed[..., :DIM], packed[..., DIM:]), blocks.plan().run(*blocks.qkv)
    )


@pytest.mark.parametrize("M, N", [(0, 16), (4, 0), (0, 0)])
def test_no_rows_or_no_keys(M, N):
    wrapper = BlockSparseAttentionWrapper(WORKSPACE)
    indptr = torch.zeros(M // 4 + 1, dtype=torch.int32)
    wrapper.plan(indptr, indptr[:0], M, N, 4, 16, 4, 2, DIM)
    q, k = torch.randn(M, 4, DIM).half(), torch.randn(N, 2, DIM).half()
    out, lse = wrapper.run(q, k, k, return_lse=True)
    assert torch.equal(out, torch.zeros(M, 4, DIM, dtype=torch.float16))
    assert torch.equal(lse, torch.full((M, 4), -math.inf))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"indices": torch.tensor([3])}, "indices out of bound"),
        ({"indices": torch.tensor([4])}, "indices out of bound"),
        ({"indices": torch.tensor([-1])}, "indices out of bound"),
        ({"N": 50}, "N must be a multiple of C = 16, got 50"),
        ({"M": 9}, r"indptr must have shape \[MB \+ 1\] with MB = 3"),
        ({"C": 0}, "C must be"),
        ({"indptr": None}, "indptr and indices must be given where block_mask is not"),
        ({"block_mask": torch.ones(2, 4, dtype=torch.bool)}, r"block_mask must have shape \[MB, NB\]"),
        ({"block_mask": torch.ones(3, 2, 3, dtype=torch.bool)}, r"block_mask must have shape \[2, 3\], \[2, MB, NB\]"),
        ({"block_mask": torch.ones(2, 3)}, "block_mask must have dtype bool"),
        ({"block_mask": torch.eye(4)[:, None, :3].bool().expand(4, 2, 3)}, "the same for all query heads of a group"),
        (
            {"block_mask": torch.ones(2, 3, dtype=torch.bool), "mask": torch.ones(1, 4, 16, dtype=torch.bool)},
            "block_mask must be given without mask",
        ),
        ({"mask": torch.ones(2, 4, 16, dtype=torch.bool)}, r"mask must have indptr\[-1\] = 1 blocks, got 2"),
        ({"packed_mask": torch.ones(1, dtype=torch.uint8)}, "packed_mask must have shape"),
    ],
)
def test_what_a_plan_of_blocks_refuses(change, words):
    arguments = {"indptr": torch.tensor([0, 1, 1]), "indices": torch.tensor([2]), "M": 8, "N": 48, "R": 4, "C": 16}
    heads = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": DIM}
    with pytest.raises((ValueError, TypeError), match=words):
        BlockSparseAttentionWrapper(WORKSPACE).plan(**{**arguments, **heads, **change})


def test_what_a_run_of_blocks_refuses():
    blocks = Blocks(20, 48, 4, 16)
    wrapper = blocks.plan()
    with pytest.raises(ValueError, match="k must have shape .N, Hk, D. with N = 48"):
        wrapper.run(blocks.q, blocks.k[1:], blocks.v)
    with pytest.raises(ValueError, match="q must have shape .M, Hq, D. with M = 20"):
        wrapper.run(blocks.q[:4], blocks.k, blocks.v)
    with pytest.raises(ValueError, match="q must have dtype float32"):
        wrapper.run(blocks.q.half(), blocks.k, blocks.v)
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        BlockSparseAttentionWrapper(WORKSPACE).run(*blocks.qkv)
    with pytest.raises(ValueError, match="backend must be one of auto, fa2, fa3"):
        BlockSparseAttentionWrapper(WORKSPACE, backend="vsa_sm100_blk64")
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        BlockSparseAttentionWrapper(WORKSPACE[1:])


class VariableBlocks:
    """Blocks of random sizes, some 0, and a random pattern for each KV head."""

    def __init__(self, sums, num_blocks, *, unit=1, group=2, dtype=torch.float32, index_dtype=torch.int32):
        generator = torch.Generator().manual_seed(sum(sums))
        self.sizes = []
        for total, count in zip(sums, num_blocks, strict=True):
            cuts = torch.randint(0, total // unit + 1, (KV_HEADS, count - 1), generator=generator).sort(1).values
            ends = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (0, 1), value=total // unit), (1, 0))
            self.sizes.append((ends.diff() * unit).to(index_dtype))
        self.chosen = torch.rand(KV_HEADS, *num_blocks, generator=generator) < 0.5
        self.chosen[:, -1] = False
        self.group, self.dtype, self.heads = group, dtype, (KV_HEADS * group, KV_HEADS, DIM)
        self.q, self.k, self.v = (
            torch.randn(heads, n, DIM, generator=generator).to(dtype)
            for heads, n in ((self.heads[0], sums[0]), (KV_HEADS, sums[1]), (KV_HEADS, sums[1]))
        )

    @property
    def qkv(self):
        return self.q, self.k, self.v

    def plan(self, **options):
        wrapper = VariableBlockSparseAttentionWrapper(WORKSPACE)
        wrapper.plan(self.chosen, *self.sizes, *self.heads, q_data_type=self.dtype, **options)
        return wrapper

    def gathered(self, **options):
        """[Hq, M, D] and [Hq, M]: each row of blocks with the keys of its blocks, and positions among these."""
        outs, lses = [], []
        for head in range(self.heads[0]):
            kv_head = head // self.group
            rows, cols = (sizes[kv_head] for sizes in self.sizes)
            results = []
            for block, part in enumerate(self.q[head].split(rows.tolist())):
                keys = self.chosen[kv_head, block].repeat_interleave(cols)
                of_head = self.k[kv_head, keys, None], self.v[kv_head, keys, None]
                results.append(attend(part[:, None], *of_head, **options))
            outs.append(torch.cat([out[:, 0] for out, _ in results]))
            lses.append(torch.cat([lse[:, 0] for _, lse in results]))
        return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("sums, num_blocks, unit", [((6, 6), (3, 3), 1), ((50, 70), (7, 9), 1), ((32, 96), (3, 5), 16)])
@pytest.mark.parametrize("group", [1, 3])
def test_variable_blocks_are_attention_by_head(dtype, index_dtype, sums, num_blocks, unit, group):
    blocks = VariableBlocks(sums, num_blocks, unit=unit, group=group, dtype=dtype, index_dtype=index_dtype)
    out, lse = blocks.plan().run(*blocks.qkv, return_lse=True)
    expected = blocks.gathered()
    assert out.dtype == dtype
    assert_near(out, expected[0], dtype)
    assert_lse(lse, expected[1])
    assert torch.equal(blocks.plan().run(*blocks.qkv), out)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"causal": True}, {"causal": True}),
        ({"logits_soft_cap": 2.0}, {"soft_cap": 2.0}),
        ({"sm_scale": 0.4}, {"sm_scale": 0.4}),
        ({"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0}, {"rope": {"scale": 2.0}}),
    ],
)
def test_options_of_variable_blocks(options, named):
    blocks = VariableBlocks((50, 70), (7, 9))
    out, lse = blocks.plan(**options).run(*blocks.qkv, return_lse=True)
    expected = blocks.gathered(**named)
    assert_near(out, expected[0], torch.float32)
    assert_lse(lse, expected[1])


def test_forward_of_variable_blocks_takes_its_own_options():
    blocks = VariableBlocks((50, 70), (7, 9))
    wrapper = blocks.plan(sm_scale=0.9)
    assert_near(wrapper.forward(*blocks.qkv, logits_soft_cap=2.0), blocks.gathered(soft_cap=2.0)[0], torch.float32)


def test_results_of_variable_blocks_are_written_in_place():
    blocks = VariableBlocks((50, 70), (7, 9), dtype=torch.bfloat16)
    wrapper = blocks.plan()
    expected = wrapper.run(*blocks.qkv, return_lse=True)
    out, lse = torch.full_like(expected[0], math.nan), torch.full_like(expected[1], math.nan)
    result = wrapper.run(*blocks.qkv, out=out, lse=lse, return_lse=True)
    assert result[0] is out
    assert result[1] is lse
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    with pytest.raises(ValueError, match="out must have shape .4, 50, 32., got .50, 4, 32."):
        wrapper.run(*blocks.qkv, out=out.transpose(0, 1))


def test_what_variable_blocks_refuse():
    blocks = VariableBlocks((50, 70), (7, 9))
    rows, cols = blocks.sizes
    wrapper = blocks.plan()
    more = rows.clone()
    more[1, 0] += 1
    with pytest.raises(ValueError, match="block_row_sz must have the same sum for every head, got .50, 51."):
        wrapper.plan(blocks.chosen, more, cols, *blocks.heads)
    negative = cols.clone()
    negative[:, 0] = -1
    with pytest.raises(ValueError, match="block_col_sz must not be negative, got -1"):
        wrapper.plan(blocks.chosen, rows, negative, *blocks.heads)
    with pytest.raises(ValueError, match="block_col_sz must have shape .Hk, NB. with"):
        wrapper.plan(blocks.chosen, rows, cols[:, 1:], *blocks.heads)
    with pytest.raises(ValueError, match="block_mask_map must have shape .Hk, MB, NB. with Hk = 4"):
        wrapper.plan(blocks.chosen, rows, cols, 4, 4, DIM)
    with pytest.raises(ValueError, match="num_qo_heads must be a multiple of num_kv_heads = 2, got 3"):
        wrapper.plan(blocks.chosen, rows, cols, 3, 2, DIM)
    with pytest.raises(NotImplementedError, match="ALIBI is not supported with blocks chosen by head"):
        wrapper.plan(blocks.chosen, rows, cols, *blocks.heads, pos_encoding_mode="ALIBI")
    with pytest.raises(NotImplementedError, match="ALIBI is not supported with blocks chosen by head"):
        wrapper.forward(*blocks.qkv, pos_encoding_mode="ALIBI")
    with pytest.raises(ValueError, match="k must have shape .Hk, kv_len, D. with"):
        wrapper.run(blocks.q, blocks.k[:, 1:], blocks.v)
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        VariableBlockSparseAttentionWrapper(WORKSPACE).run(*blocks.qkv)
