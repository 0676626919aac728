import pytest
import torch

from pagedkv import BackendUnavailableError
from pagedkv.integrations.flashinfer import utils
from pagedkv.integrations.flashinfer.vendor_only import VENDOR_ONLY, lookup, refused


@pytest.mark.parametrize("name", sorted(VENDOR_ONLY))
def test_a_name_of_one_vendor_says_what_to_use_instead(name):
    stand_in = lookup(name)
    assert stand_in is lookup(name) is refused(name)
    assert stand_in.__name__ == name
    assert name in repr(stand_in)
    assert callable(stand_in)
    with pytest.raises(BackendUnavailableError, match=f"^{name} cannot run here: .* Use ") as raised:
        stand_in(torch.zeros(1), anything=True)
    assert VENDOR_ONLY[name] in str(raised.value)
    assert VENDOR_ONLY[name] in stand_in.__doc__


def test_a_class_derived_from_one_is_refused():
    with pytest.raises(BackendUnavailableError, match="CuteDslMlaDecodeRunner cannot run here"):

        class Derived(lookup("CuteDslMlaDecodeRunner")):
            pass


@pytest.mark.parametrize("name", ["apply_rope", "trtllm_nothing_of_this_name", "__path__", ""])
def test_an_unknown_name_is_no_attribute(name):
    with pytest.raises(AttributeError, match=f"module 'some.module' has no attribute '{name}'"):
        lookup(name, "some.module")
    with pytest.raises(KeyError):
        refused(name)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 7, 8, 12, 32, 40, 71])
def test_alibi_slopes_by_repeated_products(n_heads):
    n = 1
    while 2 * n <= n_heads:
        n *= 2
    slopes, step = [], 2.0 ** (-8 / n)
    for _ in range(n):
        slopes.append((slopes[-1] if slopes else 1.0) * step)
    between = 2.0 ** (-4 / n)
    for _ in range(n_heads - n):
        slopes.append(slopes[-1] * between**2 if len(slopes) > n else between)
    found = utils.get_alibi_slopes(n_heads)
    assert (found.dtype, found.shape) == (torch.float32, (n_heads,))
    # float64 products, then one rounding that may fall to either side.
    torch.testing.assert_close(
        found, torch.tensor(slopes, dtype=torch.float64).float(), rtol=torch.finfo(torch.float32).eps, atol=0.0
    )
    assert utils.get_alibi_slopes(n_heads, device="cpu").device.type == "cpu"


def test_alibi_slopes_of_no_heads_are_refused():
    with pytest.raises(ValueError, match="n_heads must be at least 1, got 0"):
        utils.get_alibi_slopes(0)


def test_enums_have_the_numbers_of_flashinfer():
    assert [(mode.name, mode.value) for mode in utils.TensorLayout] == [("NHD", 0), ("HND", 1)]
    assert [mode.name for mode in utils.PosEncodingMode] == ["NONE", "ROPE_LLAMA", "ALIBI"]
    assert [mode.name for mode in utils.MaskMode] == ["NON_CAUSAL", "CAUSAL", "CUSTOM", "MULTIITEMSCORING"]
    for enum in (utils.PosEncodingMode, utils.MaskMode):
        assert [mode.value for mode in enum] == list(range(len(enum)))
    assert utils.PosEncodingMode["ALIBI"].value == 2
    with pytest.raises(KeyError):
        utils.TensorLayout["NHDX"]


def test_dtypes_by_name():
    assert utils.canonicalize_torch_dtype("bfloat16") is torch.bfloat16
    assert utils.canonicalize_torch_dtype(torch.float16) is torch.float16
    for wrong in ("no_dtype", "nn", 3, None):
        with pytest.raises(TypeError, match="dtype must be a torch.dtype or its name"):
            utils.canonicalize_torch_dtype(wrong)
    assert utils.is_float8(torch.zeros(1).to(torch.float8_e4m3fn))
    assert utils.is_float8(torch.zeros(1).to(torch.float8_e5m2))
    assert not utils.is_float8(torch.zeros(1, dtype=torch.int8))


def test_private_names_that_programs_import():
    utils._check_kv_layout("NHD")
    with pytest.raises(KeyError):
        utils._check_kv_layout("DHN")
    cache = torch.randn(3, 2, 5, 4, 8)
    keys, values = utils._unpack_paged_kv_cache(cache, "NHD")
    assert keys.data_ptr() == cache.data_ptr()
    assert torch.equal(values, cache[:, 1])
