"""Every way in which paged_caching refuses: the code, the words, and a pool that stays as it was."""

import pytest
import torch
from infiniop_worlds import status_and_text

from pagedkv import BackendUnavailableError
from pagedkv.integrations import infiniop
from pagedkv.integrations.infiniop import InfiniopError, PagedCachingDescriptor
from pagedkv.testing.bits import same_bits, storage_bytes

F16, F32, F8 = torch.float16, torch.float32, torch.float8_e4m3fn


def arguments(dtype=F32):
    """Five tokens of two heads for a pool of three blocks of four."""
    return {
        "k_cache": torch.zeros(3, 2, 4, 8, dtype=dtype),
        "v_cache": torch.zeros(3, 2, 4, 6, dtype=dtype),
        "k": torch.ones(5, 2, 8, dtype=dtype),
        "v": torch.ones(5, 2, 6, dtype=dtype),
        "slot_mapping": torch.tensor([0, 3, -1, 7, 11]),
    }


def float8_arguments():
    scales = {"k_scale": torch.zeros(3, 2, 4), "v_scale": torch.zeros(3, 2, 4)}
    caches = {"k_cache": torch.zeros(3, 2, 4, 8).to(F8), "v_cache": torch.zeros(3, 2, 4, 6).to(F8)}
    return arguments(F16) | caches | scales


def refused(given, code, *words):
    results = [given[name] for name in ("k_cache", "v_cache", "k_scale", "v_scale") if given.get(name) is not None]
    before = [storage_bytes(result) for result in results if isinstance(result, torch.Tensor)]
    with pytest.raises(InfiniopError) as error:
        infiniop.paged_caching(**given)
    status, text = status_and_text(error)
    assert status == code, text
    for word in words:
        assert word in text
    after = [storage_bytes(result) for result in results if isinstance(result, torch.Tensor)]
    assert all(map(same_bits, after, before))
    # A descriptor for the same tensors fails alike, but for what only values show.
    if code != 3:
        handle = infiniop.Handle()
        assert infiniop.call_status(PagedCachingDescriptor.create, handle, **given) == code


def test_the_arguments_are_right_as_they_are():
    for given in (arguments(), arguments(torch.bfloat16), float8_arguments()):
        infiniop.paged_caching(**given)


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k", "v", "slot_mapping"])
def test_null_pointer(name):
    refused(arguments() | {name: None}, 4, name, "got None")


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k", "v", "slot_mapping", "k_scale"])
def test_what_is_no_tensor(name):
    refused(arguments() | {name: [1.0]}, 3, name, "got list")


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("k", torch.float64, "k must have dtype float16 or bfloat16 or float32, got float64."),
        ("k", torch.int32, "k must have dtype"),
        ("v", F16, "v must have dtype float32 like k, got float16."),
        ("k_cache", F16, "k_cache must have dtype float32 like k, got float16."),
        ("k_cache", torch.float8_e5m2, "k_cache must have dtype float32 like k"),
        ("v_cache", torch.bfloat16, "v_cache must have dtype float32 like k_cache, got bfloat16."),
        ("v_cache", F8, "v_cache must have dtype float32"),
        ("slot_mapping", torch.int16, "slot_mapping must have dtype int64 or int32, got int16."),
        ("slot_mapping", torch.uint32, "got uint32"),
        ("slot_mapping", F32, "got float32"),
    ],
)
def test_bad_dtype(name, dtype, words):
    given = arguments()
    refused(given | {name: given[name].to(dtype)}, 10, words)


def test_bad_dtype_of_quantised_caches():
    given = float8_arguments()
    rows = {"k": given["k"].float(), "v": given["v"].float()}
    refused(given | rows, 10, "k must have dtype float16 or bfloat16, got float32.")
    refused(given | {"v_cache": given["v_cache"].half()}, 10, "v_cache must have dtype float8_e4m3fn like k_cache")
    refused(given | {"k_scale": given["k_scale"].double()}, 10, "k_scale must have dtype float32, got float64.")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("k", (5, 2), "k must have shape [T, H, D], got [5, 2]."),
        ("k", (5, 2, 8, 1), "k must have shape"),
        ("v", (5, 12), "v must have shape [T, H, Dv] with T = 5 (set by k), H = 2 (set by k), got [5, 12]."),
        ("v", (4, 2, 6), "got [4, 2, 6]."),
        ("v", (5, 3, 6), "got [5, 3, 6]."),
        ("slot_mapping", (4,), "slot_mapping must have shape [T] with T = 5 (set by k), got [4]."),
        ("slot_mapping", (5, 1), "got [5, 1]."),
        ("k_cache", (3, 2, 4, 8, 1), "k_cache must have shape [N, H, P, D]"),
        ("k_cache", (3, 2, 32), "got [3, 2, 32]."),
        ("k_cache", (3, 1, 4, 8), "H = 2 (set by k)"),
        ("k_cache", (3, 2, 4, 7), "D = 8 (set by k)"),
        ("v_cache", (3, 2, 4, 6, 1), "v_cache must have shape [N, H, P, >= Dv]"),
        ("v_cache", (2, 2, 4, 6), "N = 3 (set by k_cache)"),
        ("v_cache", (3, 1, 4, 6), "H = 2 (set by k)"),
        ("v_cache", (3, 2, 5, 6), "P = 4 (set by k_cache)"),
        ("v_cache", (3, 2, 4, 5), "Dv = 6 (set by v), got [3, 2, 4, 5]."),
    ],
)
def test_bad_shape(name, shape, words):
    given = arguments()
    refused(given | {name: torch.zeros(shape, dtype=given[name].dtype)}, 11, words)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4, 1), (2, 2, 4), (3, 1, 4), (3, 2, 5)], ids=str)
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_bad_shape_of_scales(name, shape):
    refused(float8_arguments() | {name: torch.zeros(shape)}, 11, f"{name} must have shape [N, H, P]", str(list(shape)))


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k_scale"])
def test_bad_strides_are_those_that_no_pool_can_have(name):
    given = float8_arguments()
    refused(
        given | {name: given[name][:1].expand(given[name].shape)}, 12, f"{name} must not overlap itself, got strides"
    )
    rolling = given[name].as_strided(given[name].shape, (1, *given[name].stride()[1:]))
    refused(given | {name: rolling}, 12, name)


def test_dtypes_are_asked_before_shapes_and_shapes_before_strides():
    given = arguments()
    wrong = {"k_cache": torch.zeros(1, 1, 1, 1).expand(3, 2, 4, 7), "slot_mapping": torch.zeros(5, 1)}
    refused(given | wrong, 10, "slot_mapping")
    refused(given | wrong | {"slot_mapping": torch.zeros(5, 1, dtype=torch.int64)}, 11)
    refused(given | {"k_cache": torch.zeros(1, 1, 1, 1).expand(3, 2, 4, 8)}, 12, "k_cache")
    refused(given | wrong | {"v": None}, 4, "v must be")


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("slot", [12, 13, 2**31 - 1])
def test_a_slot_beyond_the_pool_writes_nothing(slot, index_dtype):
    slots = torch.tensor([0, 3, slot, 7, 11], dtype=index_dtype)
    words = f"slot_mapping must be below 12 (N * P slots), got {slot} at entry 2."
    for given in (arguments(), float8_arguments()):
        refused(given | {"slot_mapping": slots}, 3, words)
    strided = {"k": torch.ones(5, 8, 2).transpose(1, 2), "v": torch.ones(5, 6, 2).transpose(1, 2)}
    refused(arguments() | strided | {"slot_mapping": slots}, 3, words)
    assert infiniop.call_status(infiniop.paged_caching, **arguments(), backend="reference") == 0


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_come_with_float8_caches_and_only_then(name):
    given = float8_arguments()
    refused(arguments() | {name: given[name]}, 3, f"{name} must be None for float32 caches, got a tensor.")
    refused(given | {name: None}, 3, f"{name} must be given for float8_e4m3fn caches, got None.")
    refused(given | {"k_scale": given["v_scale"]}, 3, "k_scale must not overlap v_scale")


def test_tokens_that_need_several_moves_must_not_lie_in_the_pool():
    buffer = torch.zeros(3, 2, 4, 8)
    given = arguments() | {"k_cache": buffer, "k": torch.ones(5, 8, 2).transpose(1, 2)}
    refused(given | {"v": buffer.flatten()[:60].view(5, 2, 6)}, 3, "k_cache must not overlap v")


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k", "v"])
def test_gradients_and_negated_views(name):
    given = arguments()
    refused(given | {name: given[name].clone().requires_grad_()}, 3, f"{name} must not require a gradient")
    negated = torch.complex(given[name], given[name]).conj().imag
    refused(given | {name: negated}, 3, f"{name} must hold its values as they are")


def test_device_type_not_supported(monkeypatch):
    def none_can(call, name):
        raise BackendUnavailableError(f"no backend can run {call}.")

    monkeypatch.setattr("pagedkv.kernels.backend._resolve", none_can)
    refused(arguments(), 5, "no backend can run store_kv on cpu in float32")


def test_a_back_end_that_does_not_exist():
    with pytest.raises(InfiniopError, match="backend must be 'auto' or one of") as error:
        infiniop.paged_caching(**arguments(), backend="abacus")
    assert error.value.status == 3


@pytest.mark.parametrize("backend", [[], None, 3], ids=str)
def test_a_back_end_that_is_no_name(backend):
    for function in (infiniop.Handle, lambda *, backend: infiniop.paged_caching(**arguments(), backend=backend)):
        with pytest.raises(InfiniopError, match=f"backend must be .* got {type(backend).__name__}") as error:
            function(backend=backend)
        assert error.value.status == 3


def test_tensors_of_two_devices():
    refused(arguments() | {"k": torch.ones(5, 2, 8, device="meta")}, 3, "k must be on cpu like the handle, got meta.")
