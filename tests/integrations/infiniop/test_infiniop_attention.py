"""paged_attention and paged_attention_prefill against float64, over every form of table, pool and index."""

import pytest
import torch
from infiniop_worlds import DTYPES

import pagedkv
from pagedkv.integrations import infiniop
from pagedkv.integrations.infiniop import Handle, PagedAttentionDescriptor, PagedAttentionPrefillDescriptor
from pagedkv.testing.bits import same_bits
from pagedkv.testing.numeric import assert_close_to_oracle, attention_oracle

INDEX_DTYPES = [torch.int32, torch.int64, torch.uint32]


class World:
    """Sequences in shuffled blocks of an HND pool whose unused slots are NaN, and the same as a plan for the oracle."""

    def __init__(self, q_lens, kv_lens, heads, dims, block_size, dtype=torch.float32, index_dtype=torch.int32):
        self.heads, (self.dim, self.value_dim), self.block_size = heads, dims, block_size
        num_q_heads, num_kv_heads = heads
        counts = [-(-kv_len // block_size) for kv_len in kv_lens]
        order = torch.randperm(sum(counts) + 2).tolist()
        num_blocks = len(order)
        self.rows = [[order.pop() for _ in range(count)] for count in counts]
        self.q = torch.randn(sum(q_lens), num_q_heads, self.dim).to(dtype)
        self.k_cache = torch.full((num_blocks, num_kv_heads, block_size, self.dim), torch.nan, dtype=dtype)
        self.v_cache = torch.full((num_blocks, num_kv_heads, block_size, self.value_dim), torch.nan, dtype=dtype)
        for row, kv_len in zip(self.rows, kv_lens, strict=True):
            for cache in (self.k_cache, self.v_cache):
                for block, start in zip(row, range(0, kv_len, block_size), strict=True):
                    cache[block, :, : kv_len - start].normal_()
        # Wider than needed, a slice of something larger, and padded with ids that no pool has.
        padding = 2**31 - 1 if index_dtype == torch.uint32 else -1
        padded = [row + [padding] * (max(counts, default=0) + 1 - len(row)) for row in self.rows]
        width = max(counts, default=0) + 1
        wide = torch.full((len(kv_lens), width + 3), 10**6)
        wide[:, 2:-1] = torch.tensor(padded, dtype=torch.int64).view(len(kv_lens), width)
        self.block_tables = wide.to(index_dtype)[:, 2:-1]
        self.lens = torch.tensor(kv_lens).to(index_dtype)
        self.starts = torch.tensor([0, *q_lens]).cumsum(0).to(index_dtype)
        table = pagedkv.PageTable.from_rows(self.rows, kv_lens, block_size)
        self.plan = pagedkv.plan_attention(
            self.starts.to(torch.int32),
            table,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self.dim,
            value_dim=self.value_dim,
        )

    def assert_close(self, out, scale, alibi_slopes=None, caches=None, **scales):
        caches = caches or (self.k_cache, self.v_cache)
        exact, plain = (
            attention_oracle(
                self.q,
                *caches,
                self.plan,
                layout="HND",
                sm_scale=scale,
                alibi_slopes=alibi_slopes,
                arithmetic=arithmetic,
                **scales,
            ).out
            for arithmetic in (torch.float64, torch.float32)
        )
        assert out.dtype == self.q.dtype
        assert_close_to_oracle("out", out, exact, plain)

    def decode(self, **options):
        return infiniop.paged_attention(self.q, self.k_cache, self.v_cache, self.block_tables, self.lens, **options)

    def prefill(self, **options):
        return infiniop.paged_attention_prefill(
            self.q, self.k_cache, self.v_cache, self.block_tables, self.lens, self.starts, **options
        )


# num_seqs, num_heads, num_kv_heads, dims, block_size, max_len
DECODE = [
    (1, 1, 1, (128, 128), 16, 50),
    (4, 8, 8, (128, 128), 16, 100),
    (7, 16, 4, (64, 64), 8, 90),
    (2, 40, 40, (64, 64), 32, 40),
    (3, 8, 1, (576, 512), 16, 40),
    (3, 6, 3, (192, 192), 16, 40),
    (3, 4, 2, (256, 256), 256, 260),
    (3, 4, 2, (40, 24), 5, 33),
    (2, 3, 1, (7, 5), 3, 11),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_slopes", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(case, has_slopes, dtype):
    num_seqs, num_q_heads, num_kv_heads, dims, block_size, max_len = case
    lens = torch.randint(1, max_len + 1, (num_seqs,)).tolist()
    world = World([1] * num_seqs, lens, (num_q_heads, num_kv_heads), dims, block_size, dtype)
    slopes = torch.rand(num_q_heads) if has_slopes else None
    scale = dims[0] ** -0.5
    out = world.decode(alibi_slopes=slopes, scale=scale)
    assert out.shape == (num_seqs, num_q_heads, dims[1])
    world.assert_close(out, scale, slopes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_slopes", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize(
    ("heads", "dims", "block_size"),
    [((8, 2), (64, 64), 16), ((4, 4), (128, 128), 8), ((4, 1), (576, 512), 16), ((2, 2), (40, 16), 7)],
    ids=str,
)
def test_prefill_behind_a_history(heads, dims, block_size, has_slopes, dtype):
    q_lens, kv_lens = [5, 1, 16, 0, 3], [5, 33, 40, 9, 2 * block_size]
    world = World(q_lens, kv_lens, heads, dims, block_size, dtype)
    slopes = torch.rand(heads[0]) if has_slopes else None
    world.assert_close(world.prefill(alibi_slopes=slopes, scale=0.1), 0.1, slopes)


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_indices_of_every_dtype_give_the_same_bits(index_dtype):
    lens = [17, 1, 16, 0]
    torch.manual_seed(3)
    expected = World([1] * 4, lens, (4, 2), (16, 16), 8).decode()
    torch.manual_seed(3)
    world = World([1] * 4, lens, (4, 2), (16, 16), 8, index_dtype=index_dtype)
    assert not world.block_tables.is_contiguous()
    assert same_bits(world.decode(), expected)
    assert same_bits(world.prefill(), expected)


def test_the_scale_is_one_unless_given():
    world = World([1, 1], [9, 4], (2, 1), (8, 8), 4)
    world.assert_close(world.decode(), 1.0)


def test_sequences_without_keys_give_zeros():
    world = World([1] * 3, [0, 5, 0], (4, 2), (16, 8), 4)
    out = world.decode()
    assert out[[0, 2]].eq(0).all()
    assert out[1].ne(0).all()
    world = World([2, 3, 0], [0, 5, 0], (4, 2), (16, 8), 4)
    out = world.prefill()
    assert out[:2].eq(0).all()
    assert out[2:].ne(0).all()
    nothing = World([], [], (4, 2), (16, 8), 4)
    assert nothing.decode().shape == nothing.prefill().shape == (0, 4, 8)


@pytest.mark.parametrize("form", ["contiguous", "padded_heads", "wide_rows"])
def test_results_of_any_stride_are_filled_and_nothing_else(form):
    world = World([1] * 3, [9, 3, 8], (4, 2), (16, 8), 4)
    expected = world.decode()
    buffer = torch.full((4, 6, 11), 7.0)
    out = {
        "contiguous": torch.empty(3, 4, 8),
        "padded_heads": buffer[:3, 1:5, :8],
        "wide_rows": buffer[1:, 2:, 3:],
    }[form]
    assert world.decode(out=out) is out
    assert same_bits(out, expected)
    assert world.prefill(out=out.zero_()) is out
    assert same_bits(out, expected)
    out.fill_(7.0)
    assert buffer.eq(7.0).all()


def test_query_heads_and_pools_may_be_strided():
    world = World([2, 1], [6, 5], (4, 2), (16, 16), 4)
    expected = world.prefill()
    packed = torch.randn(3, 8, 16)
    packed[:, 2:6] = world.q
    world.q = packed[:, 2:6]
    world.k_cache = world.k_cache.transpose(1, 2).contiguous().transpose(1, 2)  # NHD in memory
    both = torch.cat([world.v_cache, world.v_cache], -1)
    world.v_cache = both[..., 16:]
    assert same_bits(world.prefill(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_of_float8_through_both_operators(dtype):
    world = World([3, 1], [10, 6], (4, 2), (16, 8), 4, dtype)
    num_blocks = world.k_cache.shape[0]
    caches = torch.full((num_blocks, 2, 4, 16), torch.nan), torch.full((num_blocks, 2, 4, 8), torch.nan)
    caches = tuple(cache.to(torch.float8_e4m3fn) for cache in caches)
    scales = torch.full((2, num_blocks, 2, 4), torch.nan)
    slots = torch.cat(
        [infiniop.slots_of(torch.tensor(row), 0, n, 4) for row, n in zip(world.rows, (10, 6), strict=True)]
    )
    infiniop.paged_caching(*caches, torch.randn(16, 2, 16).to(dtype), torch.randn(16, 2, 8).to(dtype), slots, *scales)
    world.k_cache, world.v_cache = caches
    out = world.prefill(scale=0.25, k_scale=scales[0], v_scale=scales[1])
    world.assert_close(out, 0.25, key_scales=scales[0], value_scales=scales[1])


def test_descriptors_are_created_once_and_run_many_times():
    world = World([1] * 3, [9, 3, 8], (4, 2), (16, 8), 4)
    slopes, out = torch.rand(4), torch.empty(3, 4, 8)
    pool = world.q, world.k_cache, world.v_cache, world.block_tables, world.lens
    decode = PagedAttentionDescriptor.create(Handle(), out, *pool, slopes, 0.5)
    prefill = PagedAttentionPrefillDescriptor.create(Handle(), out, *pool, world.starts, slopes, 0.5)
    assert decode.workspace_size == prefill.get_workspace_size() == 0
    for lens in ([9, 3, 8], [1, 2, 7]):
        world.lens.copy_(torch.tensor(lens))
        expected = world.decode(alibi_slopes=slopes, scale=0.5)
        decode.calculate(None, out, *pool, slopes, stream=0)
        assert same_bits(out, expected)
        prefill.calculate(None, out.zero_(), *pool, world.starts, slopes)
        assert same_bits(out, expected)
    for descriptor, more in ((decode, ()), (prefill, (world.starts,))):
        descriptor.destroy()
        with pytest.raises(infiniop.InfiniopError, match=f"{type(descriptor).__name__} must not be destroyed"):
            descriptor.calculate(None, out, *pool, *more, slopes)


def test_a_strided_result_waits_in_the_workspace():
    world = World([1] * 3, [9, 3, 8], (4, 2), (16, 8), 4)
    out = torch.zeros(3, 6, 8)[:, 1:5]
    pool = world.q, world.k_cache, world.v_cache, world.block_tables, world.lens
    descriptor = PagedAttentionDescriptor.create(Handle(), out, *pool)
    assert descriptor.workspace_size == 3 * 4 * 8 * 4
    with pytest.raises(infiniop.InfiniopError, match="workspace must hold 384 bytes, got None") as error:
        descriptor.calculate(None, out, *pool)
    assert error.value.status == 13
    descriptor.calculate(torch.empty(384, dtype=torch.uint8), out, *pool)
    assert same_bits(out, world.decode())


def test_a_back_end_can_be_named(any_backend):
    world = World([1, 1], [9, 4], (2, 1), (8, 8), 4)
    world.assert_close(world.decode(backend=any_backend), 1.0)
