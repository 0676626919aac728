"""Results that share memory with each other, with what is read, or with the workspace: refused, nothing written."""

import random

import pytest
import torch

from pagedkv.integrations import infiniop
from pagedkv.integrations.infiniop import Handle, InfiniopError, PagedCachingDescriptor
from pagedkv.integrations.infiniop.tensor_memory import Footprint, may_share_memory
from pagedkv.testing.bits import same_bits, storage_bytes

F8 = torch.float8_e4m3fn


def bytes_used(shape, strides, element_size, start):
    places = [start]
    for size, stride in zip(shape, strides, strict=True):
        places = [place + i * stride * element_size for place in places for i in range(size)]
    return {place + i for place in places for i in range(element_size)}


def nested_strides(shape):
    """Strides of a tensor with gaps whose elements do not overlap, its dims in memory in any order."""
    strides, reach = [0] * len(shape), 1
    for dim in random.sample(range(len(shape)), len(shape)):
        strides[dim] = reach
        reach *= shape[dim]
        reach += random.choice([0, 0, 1, 3])
    return strides


@pytest.mark.parametrize("kind", ["one layout", "others"])
def test_what_shares_memory_is_found_byte_by_byte(kind):
    found = {True: 0, False: 0}
    for _ in range(1500):
        shape = [random.randint(1, 3) for _ in range(random.randint(0, 4))]
        strides = nested_strides(shape)
        other_shape = [random.randint(1, size) for size in shape]
        other_strides = strides if kind == "one layout" else nested_strides(other_shape)
        element_size = random.choice([1, 2, 4])
        distance = random.randint(-60, 60) * (element_size if random.random() < 0.8 else 1)
        one = Footprint.of(tuple(shape), tuple(strides), element_size)
        other = Footprint.of(tuple(other_shape), tuple(other_strides), element_size)
        shares = bool(
            bytes_used(shape, strides, element_size, 0) & bytes_used(other_shape, other_strides, element_size, distance)
        )
        answer = may_share_memory(one, other, distance)
        assert may_share_memory(other, one, -distance) == answer
        # Never missed; exact for views of one layout, but where a dim of theirs has only one item.
        assert answer >= shares
        if kind == "one layout" and shape == other_shape:
            assert answer == shares
            found[shares] += 1
    assert kind == "others" or min(found.values()) > 20


def test_nothing_shares_memory_with_no_elements():
    empty, full = Footprint.of((0, 4), (4, 1), 4), Footprint.of((4,), (1,), 4)
    assert not may_share_memory(empty, full, 0)
    assert not may_share_memory(full, empty, 0)


def caching_arguments(dtype=torch.float32):
    """Five tokens of two heads for a pool of three blocks of four."""
    return {
        "k_cache": torch.zeros(3, 2, 4, 8, dtype=dtype),
        "v_cache": torch.zeros(3, 2, 4, 8, dtype=dtype),
        "k": torch.ones(5, 2, 8, dtype=dtype),
        "v": torch.full((5, 2, 8), 2.0, dtype=dtype),
        "slot_mapping": torch.tensor([0, 3, -1, 7, 11]),
    }


def float8_arguments():
    caches = {name: torch.zeros(3, 2, 4, 8).to(F8) for name in ("k_cache", "v_cache")}
    return (
        caching_arguments(torch.float16) | caches | {"k_scale": torch.zeros(3, 2, 4), "v_scale": torch.zeros(3, 2, 4)}
    )


def refused(function, given, words):
    tensors = [tensor for tensor in given.values() if isinstance(tensor, torch.Tensor)]
    before = [storage_bytes(tensor) for tensor in tensors]
    with pytest.raises(InfiniopError, match=f"{words}, got memory that both use") as error:
        function(**given)
    assert error.value.status == 3
    assert all(same_bits(storage_bytes(tensor), held) for tensor, held in zip(tensors, before, strict=True))


def test_two_caches_in_one_memory():
    given = caching_arguments()
    cache = torch.zeros(4, 2, 4, 8)
    for k_cache, v_cache in (
        (cache[:3], cache[:3]),
        (cache[:3], cache[1:]),
        (cache[:3], cache.flatten()[63:255].view(3, 2, 4, 8)),
        (cache.flatten()[1:193].view(3, 2, 4, 8), cache[:3]),
    ):
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        refused(infiniop.paged_caching, given | caches, "k_cache must not overlap v_cache")
    dense = torch.zeros(1, 2, 4, 8)
    new = {"k": torch.ones(1, 2, 1, 8), "v": torch.ones(1, 2, 1, 8), "past_kv_lengths": torch.tensor([0])}
    refused(infiniop.kv_caching, {"k_cache": dense, "v_cache": dense[:]} | new, "k_cache must not overlap v_cache")


def test_scales_in_the_memory_of_other_results():
    given = float8_arguments()
    scale = given["k_scale"]
    for other in (scale, scale[:]):
        refused(infiniop.paged_caching, given | {"v_scale": other}, "k_scale must not overlap v_scale")
    inside = given["v_cache"].view(torch.float32).flatten()[:24].view(3, 2, 4)
    refused(infiniop.paged_caching, given | {"k_scale": inside}, "v_cache must not overlap k_scale")


def interleaved(form):
    """k_cache and v_cache [3, 2, 4, 8] float32 in one buffer."""
    if form == "layers":
        return torch.zeros(3, 2, 2, 4, 8).unbind(1)
    if form == "rows":
        return torch.zeros(3, 2, 4, 16).split(8, -1)
    if form == "elements":
        return torch.zeros(3, 2, 4, 8, 2).unbind(-1)
    assert form == "two orders in a block"
    buffer = torch.zeros(3, 128)
    return buffer[:, :64].view(3, 2, 4, 8), buffer[:, 64:].view(3, 4, 2, 8).transpose(1, 2)


@pytest.mark.parametrize("form", ["layers", "rows", "elements", "two orders in a block"])
def test_caches_may_interleave(form):
    given = caching_arguments()
    caches = dict(zip(("k_cache", "v_cache"), interleaved(form), strict=True))
    infiniop.paged_caching(**(given | caches))
    for name, value in (("k_cache", 1.0), ("v_cache", 2.0)):
        assert caches[name].sum() == 4 * 2 * 8 * value
        assert caches[name][1, :, 3].eq(value).all()


def test_codes_and_scales_of_a_block_may_lie_side_by_side():
    given = float8_arguments()
    blocks = torch.zeros(3, 192, dtype=torch.uint8)
    for name, start in (("k_cache", 0), ("v_cache", 64)):
        given[name] = blocks[:, start : start + 64].view(F8).view(3, 2, 4, 8)
    for name, start in (("k_scale", 128), ("v_scale", 160)):
        given[name] = blocks[:, start : start + 32].view(torch.float32).view(3, 2, 4)
    infiniop.paged_caching(**given)
    assert given["k_scale"][2, :, 3].tolist() == [torch.tensor(1 / 448)] * 2
    assert given["v_cache"][2, :, 3].float().eq(448).all()


@pytest.mark.parametrize("is_strided", [False, True])
def test_slots_in_a_cache(is_strided):
    given = caching_arguments()
    if is_strided:
        given |= {"k": torch.ones(5, 8, 2).transpose(1, 2)}
    slots = given["k_cache"].view(torch.int64).flatten()[-5:]
    slots.copy_(torch.tensor([11, 10, 9, 8, -1]))
    refused(infiniop.paged_caching, given | {"slot_mapping": slots}, "k_cache must not overlap slot_mapping")


def test_lengths_in_a_cache():
    cache = torch.zeros(2, 2, 4, 8)
    given = {"k_cache": torch.zeros(2, 2, 4, 8), "v_cache": cache, "k": torch.ones(2, 2, 1, 8)}
    given |= {"v": torch.ones(2, 2, 1, 8), "past_kv_lengths": cache.view(torch.int64).flatten()[:2]}
    refused(infiniop.kv_caching, given, "v_cache must not overlap past_kv_lengths")


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k", "v", "slot_mapping", "k_scale", "v_scale"])
def test_a_workspace_in_any_of_the_arguments(name):
    given = float8_arguments() | {"slot_mapping": torch.tensor([0, 3, -1, 7, 11], dtype=torch.int32)}
    size = PagedCachingDescriptor.create(Handle(), **given).workspace_size
    memory = torch.zeros(size + 1024, dtype=torch.uint8)
    inside = memory[size - 16 :][: given[name].nbytes].view(given[name].dtype).view(given[name].shape)
    inside.copy_(given[name])
    given[name] = inside
    descriptor = PagedCachingDescriptor.create(Handle(), **given)

    def calculate(**tensors):
        descriptor.calculate(memory, *tensors.values())

    refused(calculate, given, f"workspace must not overlap {name}")
    beside = memory[size + 16 :][: given[name].nbytes].view(given[name].dtype).view(given[name].shape)
    beside.copy_(given[name].clone())
    calculate(**(given | {name: beside}))  # only what the call uses of the workspace counts


ATTENTION = ["q", "k_cache", "v_cache", "block_tables", "cache_lens", "alibi_slopes"]


@pytest.mark.parametrize("strides", [(32, 8, 1), (64, 16, 1)], ids=["contiguous", "strided"])
@pytest.mark.parametrize("name", ATTENTION)
def test_a_result_in_any_of_the_arguments_of_attention(name, strides):
    given = {
        "q": torch.randn(2, 4, 8),
        "k_cache": torch.randn(6, 2, 4, 8),
        "v_cache": torch.randn(6, 2, 4, 8),
        "block_tables": torch.tensor([[3, 1], [2, -1]]),
        "cache_lens": torch.tensor([6, 3]),
        "alibi_slopes": torch.rand(4),
    }
    memory = torch.zeros(200)
    inside = memory.view(given[name].dtype).flatten()[: given[name].numel()] if given[name].numel() <= 100 else None
    if inside is None:
        memory = inside = given[name].flatten()
    inside = inside.view(given[name].shape).copy_(given[name])
    out = memory.as_strided((2, 4, 8), strides)
    shown = "seq_lens" if name == "cache_lens" else name
    refused(infiniop.paged_attention, given | {name: inside, "out": out}, f"out must not overlap {shown}")


def test_a_strided_result_may_lie_beside_the_query_in_one_buffer():
    buffer = torch.randn(2, 4, 16)
    q, out = buffer.split(8, -1)
    caches = torch.randn(2, 6, 2, 4, 8)
    indices = torch.tensor([[3, 1], [2, -1]]), torch.tensor([6, 3])
    before = q.clone()
    expected = infiniop.paged_attention(q.contiguous(), *caches, *indices)
    assert infiniop.paged_attention(q, *caches, *indices, out=out) is out
    assert same_bits(out.contiguous(), expected)
    assert same_bits(q.contiguous(), before)


def test_dense_tokens_may_come_from_the_cache_when_they_move_at_once():
    caches = torch.randn(2, 1, 3, 8, 4)
    k, v = caches[:, :, :, 1:3]
    expected = caches.clone()
    expected[:, :, :, 2:4] = caches[:, :, :, 1:3]
    infiniop.kv_caching(*caches, k, v, torch.tensor([2]))
    assert same_bits(caches, expected)
