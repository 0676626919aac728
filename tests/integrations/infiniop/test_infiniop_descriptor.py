"""The life of a descriptor: created once, run many times, destroyed; its workspace, and what it costs."""

import gc
import tracemalloc
import weakref

import pytest
import torch
from infiniop_worlds import pools, stored_by_loop, tokens
from torch.profiler import ProfilerActivity, profile

import pagedkv
from pagedkv.integrations import infiniop
from pagedkv.integrations.infiniop import Handle, InfiniopError, InfiniStatus, PagedCachingDescriptor, TensorDescriptor
from pagedkv.kernels.backend import unregister_backend
from pagedkv.testing.bits import same_bits

F8 = torch.float8_e4m3fn


def world(index_dtype=torch.int64, is_float8=False, token_form="contiguous"):
    """Caches, tokens and slots, in the order of the operator."""
    dtype = torch.float16 if is_float8 else torch.float32
    caches = pools("hnd", 4, 2, 4, 8, 6, dtype)
    new = tokens(token_form, 5, 2, 8, 6, dtype)
    slots = torch.tensor([3, -1, 15, 0, 6], dtype=index_dtype)
    if not is_float8:
        return [*caches, *new, slots]
    return [*(cache.to(F8) for cache in caches), *new, slots, torch.zeros(4, 2, 4), torch.zeros(4, 2, 4)]


def created(tensors):
    return PagedCachingDescriptor.create(Handle(), *tensors)


def workspace_of(descriptor):
    return torch.empty(descriptor.workspace_size, dtype=torch.uint8)


def test_a_descriptor_runs_many_times_on_what_its_tensors_hold_then():
    tensors = world()
    descriptor = created(tensors)
    for _ in range(3):
        k, v, slots = torch.randn(5, 2, 8), torch.randn(5, 2, 6), torch.randint(-2, 16, (5,))
        caches = pools("hnd", 4, 2, 4, 8, 6, torch.float32)
        expected = [stored_by_loop(*pair, slots) for pair in zip(caches, (k, v), strict=True)]
        assert descriptor.calculate(None, *caches, k, v, slots) is None
        assert all(map(same_bits, caches, expected))


def test_it_is_made_from_metadata_and_keeps_no_tensor():
    tensors = world()
    watched = [weakref.ref(tensor) for tensor in tensors]
    described = [TensorDescriptor.of(tensor) for tensor in tensors]
    from_tensors, from_metadata = created(tensors), created(described)
    del tensors
    gc.collect()
    assert [reference() for reference in watched] == [None] * 5
    for descriptor in (from_tensors, from_metadata):
        again = world()
        descriptor.calculate(None, *again)
        assert same_bits(again[0][0, :, 3], again[2][0])


@pytest.mark.parametrize("is_float8", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_the_workspace_is_as_large_as_it_says(index_dtype, is_float8):
    tensors = world(index_dtype, is_float8)
    descriptor = created(tensors)
    size = descriptor.get_workspace_size()
    assert size == descriptor.workspace_size
    assert (size == 0) == (index_dtype == torch.int64 and not is_float8)
    guarded = torch.full((size + 32,), 0xA5, dtype=torch.uint8)
    descriptor.calculate(guarded[16 : 16 + size] if size else None, *tensors)
    assert guarded[:16].eq(0xA5).all()
    assert guarded[16 + size :].eq(0xA5).all()
    descriptor.calculate(guarded, *tensors)  # a larger one will do
    if size:
        before = tensors[0].clone()
        tensors[2].fill_(3.0)
        for small, words in ((None, "got None"), (guarded[: size - 1], f"hold {size} bytes, got {size - 1}")):
            with pytest.raises(InfiniopError, match=words) as error:
                descriptor.calculate(small, *tensors)
            assert error.value.status is InfiniStatus.INSUFFICIENT_WORKSPACE
        assert same_bits(tensors[0], before)


@pytest.mark.parametrize(
    ("workspace", "code", "words"),
    [
        (torch.zeros(64), 10, "dtype uint8, got float32"),
        (torch.zeros(8, 8, dtype=torch.uint8), 11, r"shape \[bytes\], got \[8, 8\]"),
        (torch.zeros(128, dtype=torch.uint8)[::2], 12, "contiguous, got stride 2"),
        (torch.zeros(128, dtype=torch.uint8)[3:], 3, "aligned to 16 bytes"),
        (torch.zeros(64, dtype=torch.uint8, device="meta"), 3, "on cpu like the handle, got meta"),
        (b"\0" * 64, 3, "a torch.Tensor, got bytes"),
    ],
)
def test_a_workspace_of_another_kind_is_refused(workspace, code, words):
    tensors = world(torch.int32)
    with pytest.raises(InfiniopError, match=f"workspace must .*{words}") as error:
        created(tensors).calculate(workspace, *tensors)
    assert error.value.status == code


def test_a_destroyed_descriptor_does_nothing_more():
    tensors = world()
    before = tensors[0].clone()
    with created(tensors) as descriptor:
        assert descriptor.workspace_size == 0
    descriptor.destroy()
    descriptor.destroy()
    for call in (lambda: descriptor.calculate(None, *tensors), descriptor.get_workspace_size, descriptor.__enter__):
        with pytest.raises(InfiniopError, match="PagedCachingDescriptor must not be destroyed") as error:
            call()
        assert error.value.status is InfiniStatus.BAD_PARAM
    assert same_bits(tensors[0], before)


@pytest.mark.parametrize(
    ("position", "other", "code", "words"),
    [
        (0, torch.zeros(4, 2, 4, 8, dtype=torch.float16), 10, "k_cache must have dtype"),
        (1, torch.zeros(5, 2, 4, 6), 11, r"v_cache must have shape \[4, 2, 4, 6\] as created, got \[5, 2, 4, 6\]"),
        (2, torch.zeros(5, 8, 2).transpose(1, 2), 12, r"k must have strides \[16, 8, 1\] as created, got \[16, 1, 2\]"),
        (3, None, 4, "v must be a tensor as created, got None"),
        (3, 7.5, 3, "v must be a torch.Tensor, got float"),
        (4, torch.zeros(4, dtype=torch.int64), 11, "slot_mapping must have shape"),
        (4, torch.zeros(5, dtype=torch.int32), 10, "slot_mapping must have dtype"),
        (2, torch.zeros(5, 2, 8, device="meta"), 3, "k must be on cpu"),
        (2, torch.zeros(5, 2, 8, requires_grad=True), 3, "k must not require a gradient"),
    ],
)
def test_tensors_that_changed_since_are_refused(position, other, code, words):
    tensors = world()
    descriptor = created(tensors)
    before = tensors[0].clone()
    given = [*tensors]
    given[position] = other
    with pytest.raises(InfiniopError, match=words) as error:
        descriptor.calculate(None, *given)
    assert error.value.status == code
    assert same_bits(tensors[0], before)
    with pytest.raises(InfiniopError, match="k_scale must be None as created"):
        descriptor.calculate(None, *tensors, torch.zeros(4, 2, 4))


@pytest.mark.parametrize("stream", [7, "1"])
def test_streams_of_a_cpu(stream):
    tensors = world()
    descriptor = created(tensors)
    descriptor.calculate(None, *tensors, stream=None)
    descriptor.calculate(None, *tensors, stream=0)
    with pytest.raises(InfiniopError, match="stream must be None or 0") as error:
        descriptor.calculate(None, *tensors, stream=stream)
    assert error.value.status is InfiniStatus.BAD_PARAM


@pytest.mark.parametrize(("handle", "code"), [(None, 4), ("cpu", 3)], ids=str)
def test_a_handle_must_be_one(handle, code):
    with pytest.raises(InfiniopError, match="handle must be a Handle") as error:
        PagedCachingDescriptor.create(handle, *world())
    assert error.value.status == code


def allocated_bytes(trace):
    return sum(max(0, event.self_cpu_memory_usage) for event in trace.key_averages())


WORLDS = {
    "moves": {},
    "int32 slots": {"index_dtype": torch.int32},
    "strided rows": {"token_form": "strided_rows"},
    "float8": {"is_float8": True},
}


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.native
def test_a_run_allocates_no_tensor(kind):
    tensors = world(**WORLDS[kind])
    descriptor = created(tensors)
    workspace = workspace_of(descriptor)
    descriptor.calculate(workspace, *tensors)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        for _ in range(20):
            descriptor.calculate(workspace, *tensors)
    assert allocated_bytes(trace) == 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = torch.zeros(1000)
    assert allocated_bytes(trace) >= kept.numel() * 4  # it would have been seen


@pytest.mark.parametrize("kind", ["moves", "int32 slots", "strided rows"])
def test_a_thousand_runs_leave_nothing_behind(kind):
    tensors = world(**WORLDS[kind])
    descriptor = created(tensors)
    workspace = workspace_of(descriptor)
    descriptor.calculate(workspace, *tensors)
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(10):
            descriptor.calculate(workspace, *tensors)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            descriptor.calculate(workspace, *tensors)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 8000  # less than a pointer a run


# A back end of one's own


@pytest.fixture
def recorded():
    """Registers a back end that passes calls on to the reference, and notes them."""
    calls = []

    def store_kv(*arguments):
        calls.append("store_kv")
        pagedkv.kernels.reference.store_kv(*arguments)

    pagedkv.register_backend("recorder", ops={"store_kv": store_kv}, rejects=rejects_half, priority=-500)
    yield calls
    unregister_backend("recorder")


def rejects_half(call):
    return "it has no float16" if torch.float16 in call.dtypes else None


def test_a_registered_back_end_serves_the_operators(recorded):
    tensors = world()
    expected = stored_by_loop(tensors[0], tensors[2], tensors[4])
    PagedCachingDescriptor.create(Handle("cpu", "recorder"), *tensors).calculate(None, *tensors)
    assert same_bits(tensors[0], expected)
    infiniop.paged_caching(*tensors, backend="recorder")
    assert recorded == ["store_kv"] * 2
    infiniop.paged_caching(*tensors)
    assert len(recorded) == 2  # the default does not ask for it


def test_a_back_end_that_cannot_is_refused_when_the_descriptor_is_made(recorded):
    described = [TensorDescriptor.of(tensor.half() if tensor.is_floating_point() else tensor) for tensor in world()]
    with pytest.raises(InfiniopError, match="cannot run store_kv: it has no float16") as error:
        PagedCachingDescriptor.create(Handle("cpu", "recorder"), *described)
    assert error.value.status is InfiniStatus.DEVICE_TYPE_NOT_SUPPORTED
    assert isinstance(error.value.__cause__, pagedkv.BackendUnavailableError)
    assert recorded == []
