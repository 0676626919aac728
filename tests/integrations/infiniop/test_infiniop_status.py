"""Codes, numbers and metadata: what a caller of the operator library knows by heart."""

import pickle

import pytest
import torch

from pagedkv import BackendUnavailableError, PagedKVError
from pagedkv.integrations import infiniop
from pagedkv.integrations.infiniop import Handle, InfiniDevice, InfiniDtype, InfiniopError, InfiniStatus, call_status
from pagedkv.integrations.infiniop.status import as_infiniop_errors

PUBLISHED = {
    0: "Success",
    1: "Internal Error",
    2: "Not Implemented",
    3: "Bad Parameter",
    4: "Null Pointer",
    5: "Device Type Not Supported",
    6: "Device Not Found",
    7: "Device Not Initialized",
    8: "Device Architecture Not Supported",
    10: "Bad Tensor Data Type",
    11: "Bad Tensor Shape",
    12: "Bad Tensor Strides",
    13: "Insufficient Workspace",
}


def test_statuses_have_the_published_numbers_and_strings():
    assert {int(status): status.description for status in InfiniStatus} == PUBLISHED
    assert InfiniStatus.BAD_TENSOR_DTYPE == 10
    assert InfiniStatus.INSUFFICIENT_WORKSPACE == 13


def test_an_error_says_the_rule_and_the_status_and_survives_pickling():
    error = InfiniopError(InfiniStatus.BAD_TENSOR_SHAPE, "k must have shape [T, H, D], got [3].")
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert str(copy) == "k must have shape [T, H, D], got [3]. (Bad Tensor Shape, status 11)"
        assert copy.status is InfiniStatus.BAD_TENSOR_SHAPE
        assert isinstance(copy, PagedKVError)
        assert isinstance(copy, ValueError)


def test_errors_from_below_get_a_status_and_keep_their_cause():
    for error, status in (
        (ValueError("slots"), InfiniStatus.BAD_PARAM),
        (TypeError("slots"), InfiniStatus.BAD_PARAM),
        (BackendUnavailableError("slots"), InfiniStatus.DEVICE_TYPE_NOT_SUPPORTED),
    ):
        with pytest.raises(InfiniopError, match="slots") as raised, as_infiniop_errors():
            raise error
        assert raised.value.status is status
        assert raised.value.__cause__ is error
    own = InfiniopError(InfiniStatus.NULL_POINTER, "k must be there.")
    with pytest.raises(InfiniopError) as raised, as_infiniop_errors():
        raise own
    assert raised.value is own


def test_call_status_turns_errors_into_codes_and_nothing_else():
    pool, rows = torch.zeros(2, 3, 1, 4, 8), torch.ones(2, 1, 1, 8)
    assert call_status(infiniop.paged_caching, *pool, *rows, torch.tensor([5])) is InfiniStatus.SUCCESS
    assert pool.sum() == 16
    assert call_status(infiniop.paged_caching, *pool, *rows, slot_mapping=torch.tensor([12])) is InfiniStatus.BAD_PARAM
    with pytest.raises(ZeroDivisionError):
        call_status(lambda: 1 // 0)


def test_devices_have_the_published_numbers():
    names = "CPU NVIDIA CAMBRICON ASCEND METAX MOORE ILUVATAR KUNLUN HYGON QY ALI".split()  # noqa: SIM905
    assert [device.name for device in InfiniDevice] == names
    assert [int(device) for device in InfiniDevice] == list(range(11))
    assert (InfiniDevice.CPU.torch_type, InfiniDevice.NVIDIA.torch_type) == ("cpu", "cuda")


def test_dtypes_have_the_published_numbers_and_go_there_and_back():
    names = "INVALID BYTE BOOL I8 I16 I32 I64 U8 U16 U32 U64 F8 F16 F32 F64 C16 C32 C64 C128 BF16".split()  # noqa: SIM905
    assert [dtype.name for dtype in InfiniDtype] == names
    assert [int(dtype) for dtype in InfiniDtype] == list(range(20))
    for number in set(InfiniDtype) - {InfiniDtype.INVALID, InfiniDtype.C16, InfiniDtype.BYTE}:
        assert InfiniDtype.of(number.torch_dtype) is number
    assert InfiniDtype.F8.torch_dtype == torch.float8_e4m3fn
    assert InfiniDtype.BYTE.torch_dtype == torch.uint8


@pytest.mark.parametrize("number", [InfiniDtype.INVALID, InfiniDtype.C16])
def test_dtypes_that_torch_lacks_are_refused(number):
    with pytest.raises(InfiniopError, match=f"that torch has, got {number.name}") as error:
        _ = number.torch_dtype
    assert error.value.status is InfiniStatus.BAD_TENSOR_DTYPE
    with pytest.raises(InfiniopError, match="one of InfiniDtype, got float8_e5m2"):
        InfiniDtype.of(torch.float8_e5m2)


def test_a_handle_names_device_and_back_end():
    assert repr(Handle()) == "Handle(device='cpu', backend='auto')"
    assert repr(Handle(InfiniDevice.CPU, "reference")) == "Handle(device='cpu', backend='reference')"
    assert Handle(torch.device("cpu")).device == torch.device("cpu")


def test_a_handle_of_no_device_here_is_refused(monkeypatch):
    for device, words in (
        (InfiniDevice.KUNLUN, "CPU, NVIDIA, .* got KUNLUN"),
        ("abacus", "got 'abacus'"),
        (7.5, "7.5"),
        (0, "an InfiniDevice or one that this torch knows by name, got 0"),
        (True, "got True"),
    ):
        with pytest.raises(InfiniopError, match=words) as error:
            Handle(device)
        assert error.value.status is InfiniStatus.DEVICE_TYPE_NOT_SUPPORTED
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InfiniopError, match="one of 0 cuda devices, got 'cuda'") as error:
        Handle(InfiniDevice.NVIDIA)
    assert error.value.status is InfiniStatus.DEVICE_NOT_FOUND


@pytest.mark.parametrize("device", ["cpu:3", torch.device("cpu", 1), "xla", "vulkan"], ids=str)
def test_a_handle_of_a_known_type_that_is_not_there_is_refused(device):
    with pytest.raises(InfiniopError, match=f"one of . (cpu|xla|vulkan) devices, got '{device}'") as error:
        Handle(device)
    assert error.value.status is InfiniStatus.DEVICE_NOT_FOUND


def test_a_handle_names_its_device_as_tensors_do(monkeypatch):
    assert Handle("cpu:0").device == torch.zeros(1).device
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert Handle("cuda").device == torch.device("cuda", 1)
    assert Handle("cuda:0").device == torch.device("cuda", 0)
    with pytest.raises(InfiniopError, match="one of 2 cuda devices, got 'cuda:2'"):
        Handle("cuda:2")


@pytest.mark.parametrize("stream", [1, True, "0", object()], ids=str)
def test_a_cpu_has_no_streams(stream):
    with pytest.raises(InfiniopError, match="stream must be None or 0 on a CPU") as error:
        Handle().on_stream(stream)
    assert error.value.status is InfiniStatus.BAD_PARAM
    for current in (None, 0):
        with Handle().on_stream(current):
            pass


def test_a_tensor_descriptor_is_metadata_alone():
    tensor = torch.zeros(4, 2, 8, dtype=torch.float16).transpose(0, 1)
    given = infiniop.TensorDescriptor.of(tensor)
    assert given == infiniop.TensorDescriptor([2, 4, 8], [8, 16, 1], InfiniDtype.F16)
    assert hash(given) == hash(infiniop.TensorDescriptor.of(tensor.clone()))
    assert given.fits(torch.ones(4, 2, 8).half().transpose(0, 1))
    for other in (torch.zeros(2, 4, 8).half(), tensor.float(), tensor[:1]):
        assert not given.fits(other)
    one = infiniop.TensorDescriptor.of(torch.zeros(1, 8))
    assert one.fits(torch.zeros(5, 3, 8)[:, 1][:1])  # the stride of one row never moves anywhere


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (([2, -1], [1, 1], torch.float32), InfiniStatus.BAD_TENSOR_SHAPE, r"0 or more .* got \[2, -1\]"),
        (([2**63], [1], torch.float32), InfiniStatus.BAD_TENSOR_SHAPE, r"below 2\*\*63, got"),
        (([2**31, 2**31], [0, 0], torch.float32), InfiniStatus.BAD_TENSOR_SHAPE, r"less than 2\*\*63 bytes"),
        (([2.5], [1], torch.float32), InfiniStatus.BAD_TENSOR_SHAPE, r"shape must be a sequence of ints, got \[2.5\]"),
        (([True], [1], torch.float32), InfiniStatus.BAD_TENSOR_SHAPE, r"sequence of ints, got \[True\]"),
        ((None, [1], torch.float32), InfiniStatus.BAD_TENSOR_SHAPE, "sequence of ints, got None"),
        (("ab", [1], torch.float32), InfiniStatus.BAD_TENSOR_SHAPE, "sequence of ints, got 'ab'"),
        (([1] * 65, [1] * 65, torch.float32), InfiniStatus.BAD_TENSOR_SHAPE, "at most 64 dims, got 65"),
        (([2], ["x"], torch.float32), InfiniStatus.BAD_TENSOR_STRIDES, "strides must be a sequence of ints"),
        (([2], 1, torch.float32), InfiniStatus.BAD_TENSOR_STRIDES, "sequence of ints, got 1"),
        (([1], [2**70], torch.float32), InfiniStatus.BAD_TENSOR_STRIDES, "below 2"),
        (([3], [2**60], torch.float32), InfiniStatus.BAD_TENSOR_STRIDES, r"less than 2\*\*63 bytes, got .* of \[3\]"),
        (([2, 1], [1], torch.float32), InfiniStatus.BAD_TENSOR_STRIDES, r"2 numbers .* got \[1\]"),
        (([2, 1], [-1, 1], torch.float32), InfiniStatus.BAD_TENSOR_STRIDES, r"got \[-1, 1\]"),
        (([2], [1], "float32"), InfiniStatus.BAD_TENSOR_DTYPE, "got str"),
        (([2], [1], InfiniDtype.INVALID), InfiniStatus.BAD_TENSOR_DTYPE, "got INVALID"),
    ],
)
def test_metadata_that_no_tensor_has_is_refused(arguments, status, words):
    with pytest.raises(InfiniopError, match=words) as error:
        infiniop.TensorDescriptor(*arguments)
    assert error.value.status is status


def test_metadata_at_the_limits_passes():
    assert infiniop.TensorDescriptor([2**60], [1], torch.float32).shape == (2**60,)
    assert infiniop.TensorDescriptor([3], [2**60 - 1], torch.float32).footprint.num_bytes == 2**63 - 4
    assert infiniop.TensorDescriptor([0, 2**62], [2**62, 2**62], torch.float64).footprint.num_bytes == 0
    assert len(infiniop.TensorDescriptor([1] * 64, [1] * 64, torch.float32).shape) == 64
    assert infiniop.TensorDescriptor(torch.ones(2, dtype=torch.int64), (1, 1), torch.float32).shape == (1, 1)


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ([3, 4], [4, 1], False),
        ([3, 4], [1, 3], False),
        ([3, 4], [0, 1], True),
        ([1, 4], [0, 1], False),
        ([3, 4], [3, 1], True),
        ([3, 4], [9, 2], False),
        ([0, 4], [0, 0], False),
        ([], [], False),
    ],
)
def test_a_tensor_descriptor_knows_whether_elements_share_a_place(shape, strides, overlaps):
    given = infiniop.TensorDescriptor(shape, strides, torch.float32)
    assert given.may_overlap_itself == overlaps
    if 0 not in shape:
        places = torch.arange(200).as_strided(shape, strides).flatten().tolist()
        assert (len(set(places)) < len(places)) == overlaps
