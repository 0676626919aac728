"""Addresses are computed in 64 bits: tensors beyond 2**31 elements, of which only a few pages are ever touched."""

import itertools

import pytest
import torch

import pagedkv
from pagedkv import PageTable, plan_attention
from pagedkv.testing.bits import same_bits

F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8

# In elements: one beyond 32 bits with a sign, one beyond those without.
FAR = {"2**31": 2**31 + 64, "2**32": 2**32 + 64}


@pytest.fixture
def memory(tmp_path):
    """Zeros in any number; what is not touched takes neither memory nor disk."""
    numbers = itertools.count()

    def zeros(num_elements, dtype):
        path = tmp_path / f"memory-{next(numbers)}"
        elements = torch.from_file(str(path), shared=True, size=num_elements, dtype=dtype)
        path.unlink()
        return elements

    return zeros


@pytest.fixture
def far_copy(memory):
    """The same elements with `axis` so far apart that 32 bits do not reach; the other axes are dense."""

    def copy(near, axis, far):
        strides, run = [0] * near.dim(), 1
        for at in reversed(range(near.dim())):
            strides[at] = far if at == axis else run
            run *= 1 if at == axis else near.shape[at]
        assert run <= far
        return memory(far * near.shape[axis], near.dtype).as_strided(near.shape, strides).copy_(near)

    return copy


def int32(values):
    return torch.tensor(list(values), dtype=torch.int32)


def make_plan(q_lens, rows, kv_lens, page_size, *, num_q_heads=4, num_kv_heads=2, head_dim=8, **options):
    return plan_attention(
        int32([0, *itertools.accumulate(q_lens)]),
        PageTable.from_rows(rows, kv_lens, page_size),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **options,
    )


def attend(query, key_pages, value_pages, plan, **options):
    return pagedkv.paged_attention(query, key_pages, value_pages, plan, return_lse=True, **options)


def assert_same(state, expected):
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)


# Two pages that a decode and an append share, and one of the append alone; the far axis has few entries.
ROWS, KV_LENS, Q_LENS = [[2, 0], [2, 0, 1]], [7, 11], [1, 3]


@pytest.mark.parametrize("axis, layout", [(0, "NHD"), (1, "NHD"), (2, "NHD"), (0, "HND"), (1, "HND")])
@pytest.mark.parametrize("dtype, far", [(F16, "2**31"), (BF16, "2**31"), (INT8, "2**32")], ids=str)
def test_attention_reads_far_pages_tokens_and_heads(dtype, far, axis, layout, far_copy, any_backend):
    plan = make_plan(Q_LENS, ROWS, KV_LENS, 4)
    shape = (3, 4, 2, 8) if layout == "NHD" else (3, 2, 4, 8)
    near = [torch.randn(shape).mul(30).to(dtype) for _ in range(2)]
    options = {"layout": layout, "backend": any_backend}
    if dtype == INT8:
        options |= {"key_scales": 0.03, "value_scales": 0.03}
    query = torch.randn(4, 4, 8)
    expected = attend(query, *near, plan, **options)
    for which in range(2):
        pages = list(near)
        pages[which] = far_copy(near[which], axis, FAR[far])
        assert_same(attend(query, *pages, plan, **options), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_attention_reads_far_scales(axis, far_copy, any_backend):
    plan = make_plan(Q_LENS, ROWS, KV_LENS, 4)
    pages = torch.randn(2, 3, 4, 2, 8).mul(30).to(INT8)
    near, query = torch.rand(3, 2, 4), torch.randn(4, 4, 8)
    scales = [near, far_copy(near, axis, FAR["2**31"])]
    states = [
        attend(query, *pages, plan, key_scales=key, value_scales=value, backend=any_backend)
        for key, value in [(near, near), (scales[1], near), (near, scales[1])]
    ]
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_attention_reads_far_queries(axis, far_copy, any_backend):
    plan = make_plan(Q_LENS, ROWS, KV_LENS, 4)
    pages, query = torch.randn(2, 3, 4, 2, 8), torch.randn(4, 4, 8).half()
    far = far_copy(query, axis, FAR["2**31"])
    assert_same(*(attend(rows, *pages, plan, backend=any_backend) for rows in (query, far)))


def test_attention_reads_the_last_pages_of_a_large_pool(memory, any_backend):
    """Contiguous pages of one token: the ids alone pass 2**27, the elements 2**31."""
    num_pages = 2**27 + 5
    pages = [memory(num_pages * 16, F16).view(num_pages, 1, 2, 8) for _ in range(2)]
    ids = [num_pages - 1, 3, num_pages - 5, num_pages - 2]
    near = torch.randn(2, 4, 1, 2, 8).half()
    for of_pool, values in zip(pages, near, strict=True):
        of_pool[ids] = values
    query = torch.randn(3, 4, 8)
    expected = attend(query, *near, make_plan([1, 2], [range(4), range(3)], [4, 3], 1), backend=any_backend)
    assert_same(attend(query, *pages, make_plan([1, 2], [ids, ids[:3]], [4, 3], 1), backend=any_backend), expected)


def test_attention_reads_the_largest_page_id(memory, any_backend):
    """Pages that overlap, two elements apart, so that 2**31 - 1 of them have room."""
    pages = memory(2**32 + 8, INT8).as_strided((2**31 - 1, 1, 1, 8), (2, 8, 8, 1))
    ids = [2**31 - 2, 0, 2**30]
    near = torch.randint(-100, 100, (3, 1, 1, 8), dtype=INT8)
    for page, values in zip(ids, near, strict=True):
        pages[page] = values
    heads = {"num_q_heads": 2, "num_kv_heads": 1}
    options = {"key_scales": 0.03, "value_scales": 0.03, "backend": any_backend}
    query = torch.randn(1, 2, 8)
    expected = attend(query, near, near, make_plan([1], [range(3)], [3], 1, **heads), **options)
    assert_same(attend(query, pages, pages, make_plan([1], [ids], [3], 1, **heads), **options), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("part", ["latent_pages", "rope_pages", "both"])
def test_latent_attention_reads_far_pages_and_tokens(axis, part, far_copy):
    plan = make_plan(Q_LENS, ROWS, KV_LENS, 4, num_q_heads=3, num_kv_heads=1, head_dim=24, value_dim=16)
    joined = torch.randn(3, 4, 24).to(BF16)
    query = torch.randn(4, 3, 24).split([16, 8], 2)
    near = {"latent_pages": joined[..., :16], "rope_pages": joined[..., 16:]}
    if part == "both":
        whole = far_copy(joined, axis, FAR["2**31"])
        far = {"latent_pages": whole[..., :16], "rope_pages": whole[..., 16:]}
    else:
        far = {**near, part: far_copy(near[part], axis, FAR["2**31"])}
    for backend, status in pagedkv.backends().items():
        if status.available and "mla_attention" in status.ops:
            options = {"sm_scale": 0.2, "return_lse": True, "backend": backend}
            assert_same(*(pagedkv.mla_attention(*query, *pages.values(), plan, **options) for pages in (near, far)))


@pytest.mark.parametrize("axis, layout", [(0, "NHD"), (1, "NHD"), (2, "NHD"), (0, "HND"), (1, "HND")])
@pytest.mark.parametrize("dtype, far", [(F16, "2**31"), (INT8, "2**32")], ids=str)
def test_store_and_gather_reach_far_pages_tokens_and_heads(dtype, far, axis, layout, far_copy, any_backend):
    shape = (3, 4, 2, 8) if layout == "NHD" else (3, 2, 4, 8)
    near = torch.randint(-100, 100, (2, *shape)).to(dtype)
    pages = [far_copy(of, axis, FAR[far]) for of in near]
    options = {"layout": layout, "backend": any_backend}
    slots = torch.tensor([11, 0, 7, -1, 8])
    tokens = torch.randint(-100, 100, (2, 5, 2, 8)).to(dtype)
    for keys_and_values in (pages, near):
        pagedkv.store_kv(*tokens, *keys_and_values, slots, **options)
    assert all(map(same_bits, pages, near))
    read = pagedkv.gather_kv(*pages, torch.arange(12), **options)
    assert all(map(same_bits, read, pagedkv.gather_kv(*near, torch.arange(12), **options)))


@pytest.mark.parametrize("axis", [0, 1])
def test_store_reads_far_tokens_and_heads(axis, far_copy, any_backend):
    near = torch.randn(3, 2, 8).half()
    far = far_copy(near, axis, FAR["2**31"])
    results = []
    for tokens in (near, far):
        pages = torch.zeros(2, 2, 4, 2, 8).half()
        pagedkv.store_kv(tokens, tokens, *pages, torch.tensor([5, 1, 6]), backend=any_backend)
        results.append(pages)
    assert same_bits(*results)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_quantising_store_writes_far_scales(axis, far_copy, any_backend):
    pages, tokens, slots = torch.zeros(2, 3, 4, 2, 8, dtype=INT8), torch.randn(2, 4, 2, 8), torch.tensor([11, 0, 6, 5])
    near = torch.zeros(2, 3, 2, 4)
    far = [far_copy(near[0], axis, FAR["2**31"]), near[1].clone()]
    for key_scales, value_scales in (near, far):
        pagedkv.store_kv(*tokens, *pages, slots, key_scales=key_scales, value_scales=value_scales, backend=any_backend)
    assert all(map(same_bits, far, near))


@pytest.mark.parametrize("axis", [0, 1])
def test_latent_store_writes_far_pages_and_tokens(axis, far_copy, any_backend):
    near = torch.zeros(3, 4, 24).half()
    far = far_copy(near, axis, FAR["2**31"])
    latent, rope = torch.randn(3, 24).half().split([16, 8], 1)
    for pages in (near, far):
        pagedkv.store_mla(latent, rope, pages[..., :16], pages[..., 16:], torch.tensor([11, 2, 4]), backend=any_backend)
    assert same_bits(far, near)


def test_store_and_gather_reach_slots_beyond_32_bits(memory, any_backend):
    """Pages of three slots: a slot number that lost its upper bits would name another offset."""
    num_pages = 2**31 // 3 + 9
    slots = torch.tensor([num_pages * 3 - 1, 2**31 + 1, 4])
    pages = [memory(num_pages * 3 * 2, INT8).view(num_pages, 3, 1, 2) for _ in range(2)]
    tokens = torch.randint(-100, 100, (2, 3, 1, 2), dtype=INT8)
    pagedkv.store_kv(*tokens, *pages, slots, backend=any_backend)
    assert all(map(same_bits, pagedkv.gather_kv(*pages, slots, backend=any_backend), tokens))
    for of_pool, values in zip(pages, tokens, strict=True):
        assert same_bits(of_pool.view(-1, 1, 2)[slots], values)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("which", ["src", "dst"])
def test_copies_reach_far_pages_and_tokens(which, axis, far_copy, any_backend):
    near = torch.randn(2, 3, 4, 16).half()
    expected = near.clone()
    far = far_copy(near[["src", "dst"].index(which)], axis, FAR["2**31"])
    src, dst = torch.tensor([2, 0]), torch.tensor([1, 2])
    pagedkv.copy_pages(expected[0], expected[1], src, dst, backend=any_backend)
    result = far if which == "dst" else near[1]
    pagedkv.copy_pages(far if which == "src" else near[0], result, src, dst, backend=any_backend)
    assert same_bits(result, expected[1])


def test_copies_within_a_large_pool(memory, any_backend):
    num_pages = 2**27 + 5
    pages = memory(num_pages * 16, F16).view(num_pages, 16)
    values = torch.randn(2, 16).half()
    pages[[num_pages - 1, 7]] = values
    pagedkv.copy_pages(
        pages, pages, torch.tensor([num_pages - 1, 7]), torch.tensor([2, num_pages - 4]), backend=any_backend
    )
    assert same_bits(pages[[2, num_pages - 4]], values)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_merging_reads_far_states(axis, far_copy, any_backend):
    values, lse = torch.randn(3, 2, 2, 8).half(), torch.randn(3, 2, 2)
    far = far_copy(values, axis, FAR["2**31"])
    assert_same(*(pagedkv.merge_states(states, lse, backend=any_backend) for states in (values, far)))
    far_lse = far_copy(lse, axis, FAR["2**31"])
    assert_same(*(pagedkv.merge_states(values, of, backend=any_backend) for of in (lse, far_lse)))
