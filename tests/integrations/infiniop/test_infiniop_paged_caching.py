"""paged_caching against a loop over tokens, bit for bit, in every memory form."""

import pytest
import torch
from infiniop_worlds import DTYPES, POOL_FORMS, TOKEN_FORMS, pools, stored_by_loop, tokens

import pagedkv
from pagedkv.integrations import infiniop
from pagedkv.testing.bits import same_bits, storage_bytes

# num_seqs, max_len, kv_heads, head, block, value head
PUBLISHED = [
    (1, 128, 8, 128, 16, 128),
    (5, 512, 40, 128, 16, 128),
    (16, 1024, 8, 64, 32, 64),
    (10, 1024, 40, 64, 32, 64),
    (2, 128, 1, 576, 16, 512),
    (3, 64, 4, 256, 16, 256),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True], ids=["hnd", "permuted_nhd"])
@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_published_cases(case, permuted, dtype):
    num_seqs, max_len, heads, dim, block_size, value_dim = case
    num_tokens = int(torch.randint(1, max_len // 8 + 1, (num_seqs,)).sum())
    num_blocks = num_tokens // block_size + 2
    form = "permuted_nhd" if permuted else "hnd"
    caches = pools(form, num_blocks, heads, block_size, dim, value_dim, dtype)
    new = tokens("contiguous", num_tokens, heads, dim, value_dim, dtype)
    slots = torch.arange(num_tokens)
    expected = [cache.clone() for cache in caches]
    for cache, rows in zip(expected, new, strict=True):
        cache[slots // block_size, :, slots % block_size] = rows
    result = infiniop.paged_caching(*caches, *new, slots)
    assert result[0] is caches[0]
    assert result[1] is caches[1]
    assert all(map(same_bits, caches, expected))


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("token_form", TOKEN_FORMS)
@pytest.mark.parametrize("pool_form", POOL_FORMS)
def test_all_strides_are_honoured(pool_form, token_form, index_dtype, any_backend):
    for dtype, (dim, value_dim) in zip(DTYPES, [(7, 5), (8, 8), (1, 6)], strict=True):
        caches = pools(pool_form, 6, 3, 5, dim, value_dim, dtype)
        k, v = tokens(token_form, 9, 3, dim, value_dim, dtype)
        # Shuffled, with padding, the first and the last slot, and one slot twice.
        slots = torch.tensor([29, 3, -1, 0, 17, 3, -(2**31), 12, 16], dtype=index_dtype)
        expected = [stored_by_loop(*pair, slots) for pair in zip(caches, (k, v), strict=True)]
        infiniop.paged_caching(*caches, k, v, slots, backend=any_backend)
        assert all(map(same_bits, caches, expected))


@pytest.mark.parametrize("pool_form", ["one_buffer", "strided_rows", "wide"])
def test_memory_between_the_rows_is_untouched(pool_form):
    caches = pools(pool_form, 4, 2, 4, 6, 5, torch.float32)
    before = storage_bytes(*caches)
    new = tokens("contiguous", 3, 2, 6, 5, torch.float32)
    slots = torch.tensor([2, 9, 15])
    kept = [cache.clone() for cache in caches]
    infiniop.paged_caching(*caches, *new, slots)
    for cache, old in zip(caches, kept, strict=True):
        cache.copy_(old)
    assert same_bits(storage_bytes(*caches), before)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_slots_may_be_strided(index_dtype):
    caches = pools("hnd", 4, 2, 4, 8, 8, torch.float16)
    new = tokens("contiguous", 5, 2, 8, 8, torch.float16)
    slots = torch.randperm(16)[:10].to(index_dtype).view(5, 2)[:, 1]
    expected = [stored_by_loop(*pair, slots) for pair in zip(caches, new, strict=True)]
    infiniop.paged_caching(*caches, *new, slots)
    assert all(map(same_bits, caches, expected))


@pytest.mark.parametrize("bits", [0x7FC1, 0xFF81, 0x8000, 0x0001])
def test_bits_are_moved_not_numbers(bits):
    caches = torch.zeros(2, 1, 1, 4, 8, dtype=torch.bfloat16)
    new = torch.full((2, 1, 1, 8), bits - 2**16 if bits > 2**15 - 1 else bits, dtype=torch.int16)
    infiniop.paged_caching(*caches, *new.view(torch.bfloat16), torch.tensor([2]))
    assert torch.equal(caches.view(torch.int16)[:, 0, 0, 2], new[:, 0, 0])


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("pool_form", ["hnd", "strided_rows"])
def test_no_tokens_and_padding_alone_write_nothing(pool_form, index_dtype):
    caches = pools(pool_form, 3, 2, 4, 8, 6, torch.float32)
    before = storage_bytes(*caches)
    for num_tokens in (0, 4):
        new = tokens("contiguous", num_tokens, 2, 8, 6, torch.float32)
        infiniop.paged_caching(*caches, *new, torch.full((num_tokens,), -1, dtype=index_dtype))
    assert same_bits(storage_bytes(*caches), before)


def test_a_pool_without_blocks_takes_padding():
    caches = torch.zeros(2, 0, 2, 4, 8)
    infiniop.paged_caching(*caches, *torch.ones(2, 3, 2, 8), torch.full((3,), -1))
    with pytest.raises(infiniop.InfiniopError, match="below 0"):
        infiniop.paged_caching(*caches, *torch.ones(2, 1, 2, 8), torch.tensor([0]))


def test_more_tokens_than_a_grid_dimension():
    num_tokens = 2**16 + 1
    caches = torch.zeros(2, num_tokens // 16 + 1, 1, 16, 2)
    new = torch.randn(2, num_tokens, 1, 2)
    infiniop.paged_caching(*caches, *new, torch.arange(num_tokens))
    assert same_bits(caches.view(2, -1, 2)[:, :num_tokens], new[:, :, 0])


def test_tokens_may_come_from_the_pool_itself():
    caches = torch.randn(2, 4, 1, 4, 8)
    k, v = (cache[0].transpose(0, 1) for cache in caches)  # the four tokens of block 0
    expected = [stored_by_loop(cache, cache[0].transpose(0, 1).clone(), torch.arange(1, 5)) for cache in caches]
    infiniop.paged_caching(*caches, k, v, torch.arange(1, 5))
    assert all(map(same_bits, caches, expected))


def test_the_result_is_the_same_on_any_number_of_threads():
    caches = torch.zeros(2, 2, 130, 4, 16, 32)
    k, v = torch.randn(2, 2000, 4, 32)
    slots = torch.randint(-5, 2080, (2000,))
    for pool, num_threads in zip(caches.unbind(1), (1, 2), strict=True):
        torch.set_num_threads(num_threads)
        infiniop.paged_caching(*pool, k, v, slots)
    assert same_bits(caches[:, 0], caches[:, 1])


def test_the_kept_descriptor_is_that_of_the_tensors():
    """Calls that differ in one stride alone must not meet each other's descriptor."""
    k, v = torch.randn(2, 3, 2, 4)
    slots = torch.tensor([0, 7, 3])
    for form in POOL_FORMS * 2:
        caches = pools(form, 2, 2, 4, 4, 4, torch.float32)
        expected = [stored_by_loop(*pair, slots) for pair in zip(caches, (k, v), strict=True)]
        infiniop.paged_caching(*caches, k, v, slots)
        assert all(map(same_bits, caches, expected))


# Requests that grow, as an engine's


class Requests:
    """A free list and a block table a request: the smallest manager that there is."""

    def __init__(self, num_blocks, block_size):
        self.free = torch.randperm(num_blocks).tolist()
        self.block_size = block_size
        self.blocks, self.lengths = {}, {}

    def slots(self, request, num_tokens):
        blocks, held = self.blocks.setdefault(request, []), self.lengths.get(request, 0)
        while len(blocks) * self.block_size < held + num_tokens:
            blocks.append(self.free.pop(0))
        self.lengths[request] = held + num_tokens
        return infiniop.slots_of(torch.tensor([*blocks, -1]), held, num_tokens, self.block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_seqs", "step", "heads", "dim", "block_size", "rounds"),
    [
        (1, 16, 8, 64, 16, 5),
        (2, 64, 8, 128, 16, 2),
        (7, 32, 16, 64, 16, 5),
        (4, 1, 2, 16, 4, 9),
        (10, 32, 40, 128, 32, 3),
    ],
)
def test_rounds_of_new_tokens_leave_the_whole_pool_right(num_seqs, step, heads, dim, block_size, rounds, dtype):
    num_blocks = num_seqs * (rounds * step // block_size + 1) + 3
    requests = Requests(num_blocks, block_size)
    caches = pools("hnd", num_blocks, heads, block_size, dim, dim, dtype)
    expected = [cache.clone() for cache in caches]
    for _ in range(rounds):
        lengths = torch.randint(1, step + 1, (num_seqs,)).tolist()
        slots = torch.cat([requests.slots(request, n) for request, n in enumerate(lengths)])
        new = tokens("contiguous", len(slots), heads, dim, dim, dtype)
        infiniop.paged_caching(*caches, *new, slots)
        for cache, rows in zip(expected, new, strict=True):
            cache[slots // block_size, :, slots % block_size] = rows
        assert all(map(same_bits, caches, expected))


def test_slots_of_a_request():
    row = torch.tensor([7, 2, 9, -1], dtype=torch.int32)
    assert infiniop.slots_of(row, 0, 4, 4).tolist() == [28, 29, 30, 31]
    assert infiniop.slots_of(row, 3, 6, 4).tolist() == [31, 8, 9, 10, 11, 36]
    assert infiniop.slots_of(row, 12, 0, 4).tolist() == []
    assert infiniop.slots_of(torch.tensor([2**40]), 3, 1, 256).tolist() == [2**48 + 3]
    assert infiniop.slots_of(torch.tensor([2**61 - 1]), 3, 1, 4).tolist() == [2**63 - 1]
    assert infiniop.slots_of(torch.tensor([2**63 - 1]), 0, 1, 1).tolist() == [2**63 - 1]
    table = pagedkv.PageTable.from_rows([[7, 2, 9]], seq_lens=[9], page_size=4)
    new = torch.tensor([0, 6], dtype=torch.int32)
    assert torch.equal(infiniop.slots_of(row, 3, 6, 4), table.slot_mapping(new))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((torch.tensor([1, 2]), 5, 4, 4), 3, "at most 8 .* got 9"),
        ((torch.tensor([1, -1]), 2, 4, 4), 3, "block for position 4, got -1"),
        ((torch.tensor([1]), -1, 1, 4), 3, "start must be at least 0"),
        ((torch.tensor([1]), 0, 1, 0), 3, "block_size must be at least 1"),
        (([1], 0, 1, 4), 3, "block_table must be a torch.Tensor, got list"),
        ((None, 0, 1, 4), 4, "block_table must be a torch.Tensor, got NoneType"),
        ((torch.tensor([3]).to_sparse(), 0, 1, 4), 3, "block_table must be a dense tensor"),
        ((torch.zeros(1, dtype=torch.int64, device="meta"), 0, 1, 4), 3, "block_table must have memory"),
        ((torch.tensor([1, 2**61]), 0, 5, 4), 3, "block for position 4, got 2305843009213693952"),
        ((torch.tensor([2**63 - 1]), 0, 1, 2), 3, "block for position 0, got 9223372036854775807"),
        ((torch.tensor([1]), 2**70, 1, 4), 3, "at most 4 "),
        ((torch.tensor([0]), 0, 1, 2**31), 3, "block_size must be below 2.*31, got 2147483648"),
        ((torch.tensor([1.0]), 0, 1, 4), 10, "int32 or int64, got float32"),
        ((torch.tensor([[1]]), 0, 1, 4), 11, r"shape \[M\], got \[1, 1\]"),
    ],
)
def test_slots_that_a_request_does_not_have(arguments, code, words):
    with pytest.raises(infiniop.InfiniopError, match=words) as error:
        infiniop.slots_of(*arguments)
    assert error.value.status == code
