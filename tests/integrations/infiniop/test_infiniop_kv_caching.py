"""kv_caching against a loop over requests, bit for bit, whatever the strides."""

import pytest
import torch
from infiniop_worlds import DTYPES

from pagedkv.integrations import infiniop
from pagedkv.integrations.infiniop import InfiniopError, KvCachingDescriptor
from pagedkv.testing.bits import same_bits, storage_bytes

ORDERS = {
    "plain": (0, 1, 2, 3),
    "tokens_first": (0, 2, 1, 3),  # [B, L, H, D] in memory
    "length_first": (2, 0, 1, 3),
    "strided_rows": (0, 1, 3, 2),
    "backwards": (3, 2, 1, 0),
}


def ordered(order, *shape, dtype=torch.float32):
    """Random [B, H, L, D] whose dims lie in memory in the order named."""
    dims = ORDERS[order]
    memory = torch.randn(*(shape[dim] for dim in dims)).to(dtype)
    return memory.permute(*(dims.index(dim) for dim in range(4)))


def stored_by_loop(cache, new, past):
    result = cache.clone()
    for request, start in enumerate(past.tolist()):
        result[request, :, start : start + new.shape[2]] = new[request]
    return result


def arguments():
    caches = {"k_cache": torch.zeros(2, 3, 10, 8), "v_cache": torch.zeros(2, 3, 10, 6)}
    new = {"k": torch.ones(2, 3, 4, 8), "v": torch.ones(2, 3, 4, 6)}
    return caches | new | {"past_kv_lengths": torch.tensor([6, 0])}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (3, 2), (2, 9), (4, 12)], ids=str)
@pytest.mark.parametrize("cache_order", ORDERS)
@pytest.mark.parametrize("order", ORDERS)
def test_all_strides_are_honoured(order, cache_order, shape, index_dtype):
    num_requests, num_new = shape
    for dtype in DTYPES:
        k, v = (ordered(order, num_requests, 3, num_new, dim, dtype=dtype) for dim in (8, 5))
        caches = [ordered(cache_order, num_requests, 3, 12, dim, dtype=dtype) for dim in (8, 5)]
        past = torch.randint(0, 12 - num_new + 1, (2 * num_requests,), dtype=index_dtype)[::2]
        expected = [stored_by_loop(*pair, past) for pair in zip(caches, (k, v), strict=True)]
        result = infiniop.kv_caching(*caches, k, v, past)
        assert result[0] is caches[0]
        assert result[1] is caches[1]
        assert all(map(same_bits, caches, expected))


def test_nothing_between_the_rows_is_written(any_backend):
    both = torch.randn(3, 2, 7, 20)
    before = both.clone()
    k_cache, v_cache = both[..., 1:9], both[..., 12:18]
    past = torch.tensor([0, 6, 3])
    infiniop.kv_caching(k_cache, v_cache, torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 6), past, backend=any_backend)
    for request, position in enumerate(past.tolist()):
        assert both[request, :, position, 1:9].eq(0).all()
        assert both[request, :, position, 12:18].eq(0).all()
        both[request, :, position] = before[request, :, position]
    assert same_bits(both, before)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_no_requests_and_no_tokens(shape):
    num_requests, num_new = shape
    caches = torch.randn(2, num_requests, 2, 5, 8)
    before = caches.clone()
    new = torch.ones(2, num_requests, 2, num_new, 8)
    infiniop.kv_caching(*caches, *new, torch.full((num_requests,), 5))
    assert same_bits(caches, before)


def test_a_descriptor_runs_step_after_step():
    given = arguments()
    given["k"], given["v"] = given["k"][:, :, :1], given["v"][:, :, :1]
    descriptor = KvCachingDescriptor.create(infiniop.Handle(), *given.values())
    workspace = torch.empty(descriptor.workspace_size, dtype=torch.uint8)
    expected = given["k_cache"].clone()
    for step in range(4):
        given["k"].fill_(step + 1.0)
        expected[0, :, 6 + step], expected[1, :, step] = step + 1.0, step + 1.0
        descriptor.calculate(workspace, *given.values())
        given["past_kv_lengths"] += 1
    assert same_bits(given["k_cache"], expected)
    with pytest.raises(InfiniopError, match="request 0 must be in 0..9 .* got 10"):
        descriptor.calculate(workspace, *given.values())
    descriptor.destroy()
    with pytest.raises(InfiniopError, match="KvCachingDescriptor must not be destroyed"):
        descriptor.calculate(workspace, *given.values())


def test_a_descriptor_needs_its_workspace():
    given = arguments()
    descriptor = KvCachingDescriptor.create(infiniop.Handle(), *given.values())
    with pytest.raises(InfiniopError, match="workspace must hold") as error:
        descriptor.calculate(None, *given.values())
    assert error.value.status == 13
    assert given["k_cache"].eq(0).all()


CASES = [
    ("k", None, 4, "k must be a tensor"),
    ("past_kv_lengths", None, 4, "past_kv_lengths must be"),
    ("k_cache", torch.zeros(2, 3, 10, 8).double(), 10, "k_cache must have dtype float16 or"),
    ("v_cache", torch.zeros(2, 3, 10, 6).half(), 10, "v_cache must have dtype float32 like k_cache"),
    ("k", torch.zeros(2, 3, 4, 8).half(), 10, "k must have dtype float32"),
    ("past_kv_lengths", torch.tensor([1, 2], dtype=torch.uint32), 10, "int32 or int64, got uint32"),
    ("k_cache", torch.zeros(2, 3, 80), 11, r"k_cache must have shape \[B, H, M, D\]"),
    # Each of these fits all shapes but in one dim.
    ("v_cache", torch.zeros(2, 3, 9, 6), 11, "M = 10"),
    ("k", torch.zeros(1, 3, 4, 8), 11, "B = 2"),
    ("k", torch.zeros(2, 2, 4, 8), 11, "H = 3"),
    ("k", torch.zeros(2, 3, 4, 7), 11, "D = 8"),
    ("v", torch.zeros(2, 3, 3, 6), 11, "L = 4"),
    ("v", torch.zeros(2, 3, 4, 5), 11, "Dv = 6"),
    ("past_kv_lengths", torch.tensor([1]), 11, "B = 2"),
    ("k_cache", torch.zeros(1, 3, 10, 8).expand(2, 3, 10, 8), 12, "k_cache must not overlap itself"),
    ("past_kv_lengths", torch.tensor([6, 7]), 3, "of request 1 must be in 0..6 .* got 7"),
    ("past_kv_lengths", torch.tensor([-1, 6]), 3, "of request 0 must be in 0..6 .* got -1"),
    ("past_kv_lengths", torch.tensor([0, 2**40]), 3, "got 1099511627776"),
    ("k", torch.zeros(2, 3, 4, 8, requires_grad=True), 3, "k must not require a gradient"),
]


@pytest.mark.parametrize(("name", "other", "code", "words"), CASES)
def test_what_is_refused_writes_nothing(name, other, code, words):
    given = arguments() | {name: other}
    caches = [given[cache] for cache in ("k_cache", "v_cache")]
    before = storage_bytes(*caches)
    with pytest.raises(InfiniopError, match=words) as error:
        infiniop.kv_caching(**given)
    assert error.value.status == code
    assert same_bits(storage_bytes(*caches), before)


def test_tokens_that_need_several_moves_must_not_lie_in_the_cache():
    given = arguments()
    with pytest.raises(InfiniopError, match="k_cache must not overlap k") as error:
        infiniop.kv_caching(**(given | {"k": given["k_cache"][:, :, 2:6]}))
    assert error.value.status == 3
