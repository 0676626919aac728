"""The operators in torch's other modes: default devices, inference mode, compiled functions, tensors without memory."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pagedkv
from pagedkv.integrations import infiniop
from pagedkv.integrations.infiniop import (
    Handle,
    InfiniopError,
    KvCachingDescriptor,
    PagedAttentionDescriptor,
    PagedAttentionPrefillDescriptor,
    PagedCachingDescriptor,
    TensorDescriptor,
)
from pagedkv.kernels.backend import unregister_backend
from pagedkv.testing.bits import same_bits

F8 = torch.float8_e4m3fn


def caching():
    caches = [torch.zeros(6, 2, 4, 8), torch.zeros(6, 2, 4, 8)]
    return [*caches, torch.ones(3, 2, 8), torch.ones(3, 2, 8), torch.tensor([0, 5, -1], dtype=torch.int32)]


def caching_float8():
    caches = [torch.zeros(6, 2, 4, 8).to(F8) for _ in range(2)]
    rows = torch.arange(96).view(2, 3, 2, 8).half()
    return [*caches, *rows, torch.tensor([0, 5, -1]), torch.zeros(6, 2, 4), torch.zeros(6, 2, 4)]


def dense():
    caches = [torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8, 4)]
    return [*caches, torch.ones(2, 2, 3, 4), torch.ones(2, 2, 3, 4), torch.tensor([1, 2])]


def decode():
    q, k_cache, v_cache = (torch.arange(n * 8).remainder(7).float() for n in (8, 48, 48))
    indices = torch.tensor([[3, 1], [2, -1]]), torch.tensor([6, 3])
    return [q.view(2, 4, 8), k_cache.view(6, 2, 4, 8), v_cache.view(6, 2, 4, 8), *indices]


def prefill():
    return [*decode(), torch.tensor([0, 1, 2])]


CALLS = {
    "paged_caching": (infiniop.paged_caching, caching),
    "paged_caching_float8": (infiniop.paged_caching, caching_float8),
    "kv_caching": (infiniop.kv_caching, dense),
    "paged_attention": (infiniop.paged_attention, decode),
    "paged_attention_prefill": (infiniop.paged_attention_prefill, prefill),
}
calls = pytest.mark.parametrize(("function", "arguments"), CALLS.values(), ids=CALLS)


def flat(results):
    return results if isinstance(results, tuple) else (results,)


@calls
def test_the_default_device_and_dtype_do_not_matter(function, arguments, any_backend):
    expected = flat(function(*arguments(), backend=any_backend))
    given = arguments()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            results = flat(function(*given, backend=any_backend))
            slots = infiniop.slots_of(torch.full((2,), 3, device="cpu"), 1, 3, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(same_bits, results, expected))
    assert slots.tolist() == [13, 14, 15]


@calls
def test_tensors_without_memory_are_refused_when_the_operator_is_made(function, arguments):
    given = [tensor.to("meta") for tensor in arguments()]
    with pytest.raises(InfiniopError, match="a device whose tensors have memory, got meta") as error:
        function(*given)
    assert error.value.status == 5
    kind = {
        "paged_caching": PagedCachingDescriptor,
        "kv_caching": KvCachingDescriptor,
        "paged_attention": PagedAttentionDescriptor,
        "paged_attention_prefill": PagedAttentionPrefillDescriptor,
    }[function.__name__]
    if "attention" in function.__name__:
        given = [torch.empty(2, 4, 8, device="meta"), *given]
    with pytest.raises(InfiniopError) as error:
        kind.create(Handle("meta"), *given)
    assert error.value.status == 5


@calls
def test_fake_tensors_are_refused(function, arguments):
    with FakeTensorMode(), pytest.raises(InfiniopError, match="must have memory, got a FakeTensor") as error:
        function(*arguments())
    assert error.value.status == 3


def test_tensors_that_a_transform_wraps_and_emptied_ones_are_refused():
    given = caching()
    k_cache, v_cache, k, v, slots = given
    with pytest.raises(InfiniopError, match="k must have memory, got a Tensor of 48 elements without") as error:
        torch.func.vmap(lambda rows: infiniop.paged_caching(k_cache, v_cache, rows, v, slots)[0])(k.expand(2, 3, 2, 8))
    assert error.value.status == 3
    k.untyped_storage().resize_(0)
    with pytest.raises(InfiniopError, match="k must have memory"):
        infiniop.paged_caching(*given)
    assert k_cache.eq(0).all()


@pytest.fixture
def odd_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta features, says torch
        return {
            "layout sparse_coo": torch.zeros(3, 2, 8).to_sparse(),
            "layout sparse_csr": torch.zeros(3, 2, 8).to_sparse_csr(),
            "layout _mkldnn": torch.zeros(3, 2, 8).to_mkldnn(),
            "a nested tensor": torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 8)]),
        }


@calls
def test_tensors_without_strides_are_refused(function, arguments, odd_tensors):
    for position in range(len(arguments())):
        for got, odd in odd_tensors.items():
            given = arguments()
            given[position] = odd
            with pytest.raises(InfiniopError, match=f"must be a dense tensor .* got {got}") as error:
                function(*given)
            assert error.value.status == 3


def test_tensors_that_lost_their_strides_since_are_refused(odd_tensors):
    given = caching()
    descriptor = PagedCachingDescriptor.create(Handle(), *given)
    workspace = torch.empty(descriptor.workspace_size, dtype=torch.uint8)
    for odd in odd_tensors.values():
        with pytest.raises(InfiniopError, match="k must be a dense tensor"):
            descriptor.calculate(workspace, *given[:2], odd, *given[3:])
        with pytest.raises(InfiniopError, match="workspace must be a dense tensor"):
            descriptor.calculate(odd, *given)
        with pytest.raises(InfiniopError, match="tensor must be a dense tensor"):
            TensorDescriptor.of(odd)
    assert given[0].eq(0).all()


@pytest.mark.parametrize("is_strided", [False, True])
def test_results_of_inference_mode_are_filled_outside_of_it(is_strided, any_backend):
    expected = infiniop.paged_attention(*decode(), backend=any_backend)
    with torch.inference_mode():
        out = torch.empty(2, 4, 16)[..., :8] if is_strided else torch.empty(2, 4, 8)
    infiniop.paged_attention(*decode(), out=out, backend=any_backend)
    assert same_bits(out.contiguous(), expected)


@pytest.mark.parametrize("name", ["paged_caching", "paged_caching_float8", "kv_caching"])
def test_caches_of_inference_mode_are_written_outside_of_it(name, any_backend):
    function, arguments = CALLS[name]
    expected = function(*arguments())
    with torch.inference_mode():
        given = arguments()
    results = function(*given, backend=any_backend)
    assert all(map(same_bits, results, expected))


def test_a_workspace_of_inference_mode_is_used_outside_of_it():
    given = caching()
    descriptor = PagedCachingDescriptor.create(Handle(), *given)
    with torch.inference_mode():
        workspace = torch.empty(descriptor.workspace_size, dtype=torch.uint8)
    descriptor.calculate(workspace, *given)
    assert given[0].sum() == 32
    # That the cache was written is no secret to autograd, though.
    assert given[0]._version > 0


COMPILED = """
import warnings
import torch
from pagedkv.integrations import infiniop
warnings.simplefilter("error")

handle = infiniop.Handle()
caches = torch.zeros(2, 6, 2, 4, 8)
k, v = torch.ones(2, 3, 2, 8)
slots = torch.tensor([0, 5, -1])
tables, lens = torch.tensor([[0, 1]]), torch.tensor([1])

@torch.compile(backend="eager")
def step(k_cache, v_cache, k, v, slots):
    infiniop.paged_caching(k_cache, v_cache, k * 2, v + 1, slots)
    with infiniop.PagedCachingDescriptor.create(handle, k_cache, v_cache, k, v, slots) as descriptor:
        descriptor.calculate(None, k_cache, v_cache, k * 3, v, slots + 1)
    more = infiniop.slots_of(tables[0], 2, 1, 4)
    infiniop.paged_caching(k_cache, v_cache, k[:1], v[:1], more)
    return infiniop.paged_attention(k[:1] * 0, k_cache, v_cache, tables, lens) * 6

out = step(*caches, k, v, slots)
assert caches[0, 0, 0, :, 0].tolist() == [3.0, 3.0, 1.0, 0.0], caches[0, 0, 0, :, 0]
assert caches[0, 1, 1, :, 0].tolist() == [0.0, 2.0, 3.0, 0.0], caches[0, 1, 1, :, 0]
assert out.eq(6).all(), out
"""


def test_compiled_functions_call_the_operators_between_graphs():
    # A process of its own: the compiler warns once only.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


# Back ends are asked when a descriptor is made.


@pytest.fixture
def asked():
    """Registers a back end that passes attention on to the reference, and notes what it is asked."""
    seen = []

    def rejects(call):
        seen.append(call)
        return "it has no slopes" if "alibi_slopes" in call.features and call.head_dim == 16 else None

    ops = {"paged_attention": pagedkv.kernels.reference.paged_attention}
    pagedkv.register_backend("asked", ops=ops, rejects=rejects, priority=-500)
    yield seen
    unregister_backend("asked")


@pytest.mark.parametrize("is_float8", [False, True])
@pytest.mark.parametrize("has_slopes", [False, True])
def test_attention_asks_when_it_is_made_what_a_run_will_ask(asked, has_slopes, is_float8):
    q, k_cache, v_cache, *indices = decode()
    options = {"alibi_slopes": torch.ones(4) if has_slopes else None}
    if is_float8:
        k_cache, v_cache = k_cache.to(F8), v_cache.to(F8)
        options |= {"k_scale": torch.ones(6, 2, 4), "v_scale": torch.ones(6, 2, 4)}
    tensors = torch.empty(2, 4, 5), q, k_cache, v_cache[..., :5], *indices
    descriptor = PagedAttentionDescriptor.create(Handle("cpu", "asked"), *tensors, **options)
    assert len(asked) == 1
    descriptor.calculate(None, *tensors, **options)
    assert len(set(asked)) == 1  # the run asked nothing else


def test_attention_that_a_back_end_cannot_run_is_refused_when_it_is_made(asked):
    tensors = torch.zeros(2, 4, 16), torch.zeros(2, 4, 16), *torch.zeros(2, 6, 2, 4, 16), *decode()[3:]
    assert PagedAttentionDescriptor.create(Handle("cpu", "asked"), *tensors)
    handle = Handle("cpu", "asked")
    starts = torch.tensor([0, 1, 2])
    for make in (
        lambda: PagedAttentionDescriptor.create(handle, *tensors, alibi_slopes=torch.ones(4)),
        lambda: PagedAttentionPrefillDescriptor.create(handle, *tensors, starts, alibi_slopes=torch.ones(4)),
    ):
        with pytest.raises(InfiniopError, match="cannot run paged_attention: it has no slopes") as error:
            make()
        assert error.value.status == 5
