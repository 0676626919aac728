"""Appends by CSR page tables against plain loops, bit for bit, and a manager that uses both forms."""

from collections import defaultdict

import pytest
import torch
from page_batches import (
    CACHE_FORMS,
    DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    NUM_PAGES,
    PAGE_SIZES,
    csr,
    ints,
    make_cache,
    random_batch,
)

from pagedkv.integrations.flashinfer.page import (
    append_paged_kv_cache,
    append_paged_mla_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
)
from pagedkv.testing.bits import same_bits, storage_bytes

# append_paged_kv_cache, CSR


@pytest.mark.parametrize("form", CACHE_FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_append_writes_what_a_loop_writes_and_nothing_else(index_dtype, dtype, page_size, layout, form):
    heads, dim = 3, 7
    value_dim = dim if form in ("combined", "page_slices") else 5
    cache, (key_pages, value_pages) = make_cache(form, layout, page_size, heads, dim, value_dim, dtype)
    seq_lens, appended = [7, 0, 3, page_size, 1], [4, 0, 3, 1, 0]
    rows, last = random_batch(page_size, seq_lens)
    indptr = torch.tensor([0, *torch.tensor(appended).cumsum(0).tolist()], dtype=index_dtype)
    nnz = sum(appended) + 2
    batch_indices, positions = get_batch_indices_positions(indptr, ints(*seq_lens, dtype=index_dtype), nnz)
    fused = torch.randn(nnz, heads * (dim + value_dim)).to(dtype)
    key, value = fused.split([heads * dim, heads * value_dim], 1)
    key, value = key.view(nnz, heads, dim), value.view(nnz, heads, value_dim)
    expected_key, expected_value = key_pages.clone(), value_pages.clone()
    for token, (request, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        if request >= 0:
            at = rows[request][position // page_size], position % page_size
            expected_key[at], expected_value[at] = key[token], value[token]
    arguments = batch_indices.to(index_dtype), positions.to(index_dtype), cache, *csr(rows, last, index_dtype)
    assert append_paged_kv_cache(key, value, *arguments, kv_layout=layout) is None
    assert same_bits(key_pages, expected_key)
    assert same_bits(value_pages, expected_value)
    if form == "apart":  # the columns beside the values
        gaps = torch.empty(0, dtype=dtype).set_(value_pages.untyped_storage()).view(-1, 2 * value_dim + 3)
        assert gaps[:, :1].isnan().all()
        assert gaps[:, 1 + value_dim :].isnan().all()


@pytest.mark.parametrize("form", ["combined", "pair"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_takes_pages_of_one_token_without_their_dim(layout, form):
    cache = torch.zeros(6, 2, 3, 8)
    key, value = torch.randn(2, 2, 3, 8)
    given = cache if form == "combined" else (cache[:, 0], cache[:, 1])
    append_paged_kv_cache(key, value, ints(0, 1), ints(1, 0), given, *csr([[4, 2], [5]], [1, 1]), layout)
    expected = torch.zeros_like(cache)
    expected[2], expected[5] = torch.stack([key[0], value[0]]), torch.stack([key[1], value[1]])
    assert same_bits(cache, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_append_moves_the_bits_of_quantised_caches(dtype):
    cache = torch.zeros(3, 2, 4, 1, 16, dtype=dtype)
    codes = torch.randint(0, 256, (1, 1, 16), dtype=torch.uint8).view(dtype)
    append_paged_kv_cache(codes, codes, ints(0), ints(5), cache, *csr([[0, 2]], [2]))
    assert same_bits(cache[2, 1, 1:2], codes)


@pytest.mark.parametrize("batch", [([], []), ([[]], [0]), ([[3], []], [1, 0])], ids=str)
def test_append_of_no_tokens_and_of_skipped_ones_writes_nothing(batch):
    cache = torch.randn(4, 2, 5, 2, 8)
    before = cache.clone()
    for num_tokens in (0, 3):
        new, skipped = torch.ones(num_tokens, 2, 8), torch.full((num_tokens,), -1)
        append_paged_kv_cache(new, new, skipped, torch.full((num_tokens,), 2**40), cache, *csr(*batch))
    assert same_bits(cache, before)


def test_append_ignores_the_last_page_length_of_a_request_without_pages():
    cache = torch.zeros(4, 2, 5, 1, 2)
    append_paged_kv_cache(torch.ones(1, 1, 2), torch.ones(1, 1, 2), ints(1), ints(0), cache, *csr([[], [2]], [9, 1]))
    assert cache.sum(dim=(1, 2, 3, 4)).tolist() == [0, 0, 4, 0]


def test_append_of_two_tokens_of_one_place_keeps_the_last():
    cache = torch.zeros(1, 2, 4, 1, 1)
    new = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    append_paged_kv_cache(new, new, ints(0, 0), ints(3, 3), cache, *csr([[0]], [4]))
    assert cache[0, :, 3].flatten().tolist() == [2, 2]


def csr_call():
    key, value = torch.randn(2, 3, 2, 8)
    indices, indptr, last = csr([[3, 1], [2]], [2, 1])
    return {
        "append_key": key,
        "append_value": value,
        "batch_indices": ints(0, 0, 1),
        "positions": ints(5, 6, 0),
        "paged_kv_cache": torch.randn(4, 2, 5, 2, 8),
        "kv_indices": indices,
        "kv_indptr": indptr,
        "kv_last_page_len": last,
    }


REFUSED = {
    "dtype of keys": ({"append_key": torch.zeros(3, 2, 8).half()}, "append_key must have dtype float32 like"),
    "dtype of values": ({"append_value": torch.zeros(3, 2, 8).half()}, "append_value must have dtype float32 like"),
    "dtypes of cache": (
        {"paged_kv_cache": (torch.zeros(4, 5, 2, 8), torch.zeros(4, 5, 2, 8).half())},
        "values of paged_kv_cache must have dtype float32",
    ),
    "heads": ({"append_key": torch.zeros(3, 1, 8)}, "append_key must have shape .*Hk = 2"),
    "head dim": ({"append_value": torch.zeros(3, 2, 7)}, "append_value must have shape .*Dv = 8"),
    "tokens": ({"append_value": torch.zeros(2, 2, 8)}, "append_value must have shape .*T = 3"),
    "batch_indices": ({"batch_indices": ints(0, 0)}, "batch_indices must have shape .*T = 3"),
    "positions": ({"positions": ints(0, 0)}, "positions must have shape .*T = 3"),
    "pages": (
        {"paged_kv_cache": (torch.zeros(4, 5, 2, 8), torch.zeros(3, 5, 2, 8))},
        "values of paged_kv_cache must have shape .*N = 4",
    ),
    "strided last dim": ({"append_key": torch.zeros(3, 2, 16)[..., ::2]}, "contiguous last dimension"),
    "strided cache": ({"paged_kv_cache": torch.zeros(4, 2, 5, 2, 16)[..., ::2]}, "contiguous last dimension"),
    "expanded cache": (
        {"paged_kv_cache": torch.zeros(1, 2, 5, 2, 8).expand(4, -1, -1, -1, -1)},
        "must not be expanded",
    ),
    "page beyond the cache": ({"kv_indices": ints(3, 1, 4)}, "kv_indices must be in .0, 4.* got 4 at entry 2"),
    "page below 0": ({"kv_indices": ints(3, -1, 2)}, "got -1 at entry 1"),
    "too few pages": ({"kv_indices": ints(3, 1)}, "indices must hold .* = 3 entries, got 2"),
    "request": ({"batch_indices": ints(0, 0, 2)}, "batch_indices must be below 2 .requests., got 2"),
    "position": (
        {"positions": ints(5, 6, 5)},
        "positions must be in .0, 5. .the pages of request 1., got 5 at entry 2",
    ),
    "position below 0": (
        {"batch_indices": ints(-1, -1, 1), "positions": ints(99, 99, -1)},
        "the pages of request 1., got -1 at entry 2",
    ),
    "last page of 0": ({"kv_last_page_len": ints(2, 0)}, "last_page_len of sequence 1 must be in 1..5 .*, got 0"),
    "last page beyond": ({"kv_last_page_len": ints(6, 1)}, "last_page_len of sequence 0 must be in 1..5 .*, got 6"),
    "indptr": ({"kv_indptr": ints(0, 2)}, "indptr must have shape"),
    "indptr decreasing": ({"kv_indptr": ints(0, 2, 1)}, "indptr must not decrease"),
    "index dtype": ({"positions": torch.zeros(3)}, "positions must have dtype int32 or int64, got float32"),
    "gradient": ({"append_key": torch.zeros(3, 2, 8, requires_grad=True)}, "must not require a gradient"),
    "one tensor": ({"paged_kv_cache": (torch.zeros(4, 5, 2, 8),)}, "must be a pair"),
}


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=REFUSED)
def test_append_refuses_before_it_writes(change, words):
    call = csr_call() | change
    cache = call["paged_kv_cache"]
    tensors = cache if isinstance(cache, tuple) else (cache,)
    before = storage_bytes(*tensors)
    with pytest.raises(ValueError, match=words):
        append_paged_kv_cache(**call)
    assert torch.equal(storage_bytes(*tensors), before)
    append_paged_kv_cache(**csr_call())


def test_append_refuses_an_unknown_layout_as_a_key():
    with pytest.raises(KeyError, match="kv_layout must be NHD or HND"):
        append_paged_kv_cache(**csr_call(), kv_layout="DHN")


# append_paged_mla_kv_cache, CSR


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("widths", [(512, 64), (40, 8), (3, 1), (16, 0)], ids=str)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_append_mla_writes_what_a_loop_writes(index_dtype, dtype, page_size, widths, views):
    ckv_dim, kpe_dim = widths
    both = torch.full((NUM_PAGES, page_size, sum(widths)), float("nan")).to(dtype)
    ckv_cache, kpe_cache = both.split(widths, -1)
    if not views:
        ckv_cache, kpe_cache = ckv_cache.contiguous(), kpe_cache.contiguous()
    rows, last = random_batch(page_size, [6, 0, 2])
    batch_indices, positions = ints(0, 2, -1, 0, 2, dtype=index_dtype), ints(5, 0, 77, 4, 1, dtype=index_dtype)
    ckv, kpe = torch.randn(5, ckv_dim).to(dtype), torch.randn(5, kpe_dim).to(dtype)
    expected = ckv_cache.clone(), kpe_cache.clone()
    for token in (0, 1, 3, 4):
        row, position = rows[int(batch_indices[token])], int(positions[token])
        at = row[position // page_size], position % page_size
        expected[0][at], expected[1][at] = ckv[token], kpe[token]
    arrays = csr(rows, last, index_dtype)
    assert append_paged_mla_kv_cache(ckv, kpe, batch_indices, positions, ckv_cache, kpe_cache, *arrays) is None
    assert same_bits(ckv_cache, expected[0])
    assert same_bits(kpe_cache, expected[1])


@pytest.mark.parametrize("kpe, kpe_cache", [(None, None), (None, torch.zeros(3, 4, 0)), (torch.zeros(1, 0), None)])
def test_append_mla_without_rope_keys(kpe, kpe_cache):
    ckv_cache = torch.zeros(3, 4, 16)
    append_paged_mla_kv_cache(torch.ones(1, 16), kpe, ints(0), ints(6), ckv_cache, kpe_cache, *csr([[1, 2]], [3]))
    assert ckv_cache.nonzero()[:, :2].unique(dim=0).tolist() == [[2, 2]]


def test_append_mla_leaves_out_a_cache_of_none():
    ckv, kpe = torch.ones(1, 16), torch.ones(1, 8)
    ckv_cache, kpe_cache = torch.zeros(3, 4, 16), torch.zeros(3, 4, 8)
    append_paged_mla_kv_cache(ckv, kpe, ints(0), ints(6), None, kpe_cache, *csr([[1, 2]], [3]))
    append_paged_mla_kv_cache(ckv, kpe, ints(0), ints(1), ckv_cache, None, *csr([[1, 2]], [3]))
    assert kpe_cache.nonzero()[:, :2].unique(dim=0).tolist() == [[2, 2]]
    assert ckv_cache.nonzero()[:, :2].unique(dim=0).tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ckv_cache": None, "kpe_cache": None}, "ckv_cache or kpe_cache must be a tensor"),
        ({"append_kpe": torch.zeros(2, 7)}, "append_kpe must have shape"),
        ({"append_ckv": torch.zeros(3, 16)}, "append_kpe must have shape"),
        ({"append_ckv": torch.zeros(2, 16).half()}, "append_ckv must have dtype float32 like ckv_cache, got float16"),
        ({"kpe_cache": torch.zeros(4, 5, 8).half()}, "kpe_cache must have dtype float32 like ckv_cache, got float16"),
        ({"kpe_cache": torch.zeros(3, 5, 8)}, "kpe_cache must have shape .*N = 4"),
        ({"positions": ints(10, 0)}, "positions must be in .0, 10.* got 10 at entry 0"),
        ({"kv_indices": ints(3, 9, 2)}, "kv_indices must be in .0, 4. .the pages of ckv_cache., got 9"),
        ({"kv_last_page_len": ints(6, 1)}, "last_page_len of sequence 0"),
    ],
)
def test_append_mla_refuses_before_it_writes(change, words):
    indices, indptr, last = csr([[3, 1], [2]], [2, 1])
    call = {
        "append_ckv": torch.ones(2, 16),
        "append_kpe": torch.ones(2, 8),
        "batch_indices": ints(0, 1),
        "positions": ints(6, 0),
        "ckv_cache": torch.zeros(4, 5, 16),
        "kpe_cache": torch.zeros(4, 5, 8),
        "kv_indices": indices,
        "kv_indptr": indptr,
        "kv_last_page_len": last,
    } | change
    with pytest.raises(ValueError, match=words):
        append_paged_mla_kv_cache(**call)
    for cache in (call["ckv_cache"], call["kpe_cache"]):
        assert cache is None or not cache.any()


# A manager as its users write it


class PagedKVCacheManager:
    """Lists of pages a request; a new page when the last is full; both forms of append."""

    def __init__(self, num_pages, page_size, heads, dim):
        self.page_size = page_size
        self.kv_cache = torch.full((num_pages, 2, page_size, heads, dim), float("nan"))
        self.free_pages = list(range(num_pages))
        self.pages = defaultdict(list)
        self.last_page_len = defaultdict(int)

    def add_request(self, request):
        self.pages[request], self.last_page_len[request] = [], 0

    def _make_room(self, request):
        """After it, the last page has at least one free place."""
        if not self.pages[request] or self.last_page_len[request] == self.page_size:
            self.pages[request].append(self.free_pages.pop())
            self.last_page_len[request] = 0

    def decode(self, requests, new_k, new_v):
        """One token a request, by dense rows: the last page length is that before the append."""
        for request in requests:
            self._make_room(request)
        append_paged_kv_cache(
            new_k, new_v, self.kv_cache, self.page_table(requests), self.last_page_lens(requests), self.page_size
        )
        for request in requests:
            self.last_page_len[request] += 1

    def prefill(self, requests, lens, keys, values):
        """Several tokens a request, packed, by CSR arrays: the last page length is that after the append."""
        for request, num_tokens in zip(requests, lens, strict=True):
            for _ in range(num_tokens):
                self._make_room(request)
                self.last_page_len[request] += 1
        indices, indptr, last = csr([self.pages[r] for r in requests], [self.last_page_len[r] for r in requests])
        append_indptr = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32)
        seq_lens = get_seq_lens(indptr, last, self.page_size)
        batch_indices, positions = get_batch_indices_positions(append_indptr, seq_lens, keys.shape[0])
        append_paged_kv_cache(keys, values, batch_indices, positions, self.kv_cache, indices, indptr, last)

    def page_table(self, requests):
        width = max(len(self.pages[request]) for request in requests)
        rows = [self.pages[r] + [-1] * (width - len(self.pages[r])) for r in requests]
        return torch.tensor(rows, dtype=torch.int32)

    def last_page_lens(self, requests):
        return torch.tensor([self.last_page_len[request] for request in requests], dtype=torch.int32)

    def release(self, request):
        self.free_pages.extend(self.pages.pop(request))
        del self.last_page_len[request]

    def contents(self, request):
        """[2, tokens, heads, dim], as an attention would read them."""
        tokens = self.kv_cache[self.pages[request]].transpose(0, 1).flatten(1, 2)
        seq_len = get_seq_lens(self.page_table([request]), self.last_page_lens([request]), self.page_size)
        return tokens[:, : int(seq_len)]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_manager_of_page_lists_keeps_what_a_dict_of_lists_keeps(page_size):
    heads, dim = 2, 4
    manager = PagedKVCacheManager(64, page_size, heads, dim)
    kept = {}

    def check():
        for request, tokens in kept.items():
            found = manager.contents(request) if tokens else torch.zeros(2, 0, heads, dim)
            assert found.shape[1] == len(tokens)
            assert not tokens or same_bits(found, torch.stack(tokens, 1))

    def prefill(lens):
        keys, values = torch.randn(2, sum(lens.values()), heads, dim)
        manager.prefill(list(lens), list(lens.values()), keys, values)
        tokens = iter(torch.stack([keys, values], 1))
        for request, num_tokens in lens.items():
            kept[request].extend(next(tokens) for _ in range(num_tokens))
        check()

    def decode(requests):
        new_k, new_v = torch.randn(2, len(requests), heads, dim)
        manager.decode(requests, new_k, new_v)
        for number, request in enumerate(requests):
            kept[request].append(torch.stack([new_k[number], new_v[number]]))
        check()

    for request in ("a", "b", "c"):
        manager.add_request(request)
        kept[request] = []
    prefill({"a": page_size, "b": 0, "c": 7})
    for _ in range(page_size + 1):
        decode(["a", "c"])
    decode(["b"])
    manager.release("c")
    del kept["c"]
    manager.add_request("d")
    kept["d"] = []
    prefill({"d": page_size - 1, "a": 2})
    for _ in range(3):
        decode(["d", "a", "b"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_latents_of_eight_bits_are_moved_as_they_are(dtype):
    cache = torch.zeros(4, 16, 40).to(dtype)
    new = torch.randn(3, 40).to(dtype)
    indptr, indices, last = torch.tensor([0, 1, 2]), torch.tensor([2, 0]), torch.tensor([2, 1])
    rows, positions, parts = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), (cache[..., :32], cache[..., 32:])
    flat = append_paged_mla_kv_cache(new[:, :32], new[:, 32:], rows, positions, *parts, indices, indptr, last)
    assert flat is None
    written = cache.view(torch.uint8)
    assert torch.equal(written[[2, 2, 0], [0, 1, 0]], new.view(torch.uint8))
    assert int((written != 0).any(-1).sum()) <= 3
