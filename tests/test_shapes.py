import pytest
import torch

from pagedkv.shapes import (
    QUANTISED_DTYPES,
    Shapes,
    check_dtype,
    check_floating,
    check_int,
    check_last_dim_contiguous,
)


def test_check_binds_then_compares():
    shapes = Shapes()
    shapes.check("key", torch.zeros(128, 8, 64), "T Hk D")
    shapes.check("slot_mapping", torch.zeros(128), "T")
    assert shapes["Hk"] == 8


def test_check_names_tensor_symbol_and_what_arrived():
    shapes = Shapes()
    shapes.check("key", torch.zeros(128, 8, 64), "T Hk D")
    with pytest.raises(
        ValueError, match=r"slot_mapping must have shape \[T\] with T = 128 \(set by key\), got \[127\]\."
    ):
        shapes.check("slot_mapping", torch.zeros(127), "T")


def test_check_rejects_rank_and_literal_size():
    with pytest.raises(ValueError, match=r"key must have shape \[T, Hk, D\], got \[2, 3\]\."):
        Shapes().check("key", torch.zeros(2, 3), "T Hk D")
    with pytest.raises(ValueError, match=r"cache must have shape \[N, 2, P\], got \[4, 3, 1\]\."):
        Shapes().check("cache", torch.zeros(4, 3, 1), "N 2 P")


@pytest.mark.parametrize(
    "odd, words",
    [
        (torch.zeros(2, 3).to_sparse(), "layout sparse_coo"),
        (torch.zeros(2, 3).to_mkldnn(), "layout _mkldnn"),
        (torch.nested.nested_tensor([torch.zeros(3), torch.zeros(3)], layout=torch.jagged), "a nested tensor"),
    ],
    ids=["sparse", "mkldnn", "nested"],
)
def test_check_rejects_what_has_no_strides(odd, words):
    with pytest.raises(TypeError, match=rf"key must be a dense tensor \(layout strided\), got {words}\."):
        Shapes().check("key", odd, "T D")


def test_check_rejects_a_size_that_one_tensor_contradicts_itself_on():
    with pytest.raises(ValueError, match=r"square must have shape \[A, A\], got \[2, 3\]"):
        Shapes().check("square", torch.zeros(2, 3), "A A")


def test_known_sizes_and_zero_are_bound():
    with pytest.raises(ValueError, match=r"with T = 0 \(set by the call\), got \[1\]"):
        Shapes(T=0).check("slots", torch.zeros(1), "T")


def test_check_rejects_what_is_no_tensor():
    with pytest.raises(TypeError, match="key must be a torch.Tensor, got list"):
        Shapes().check("key", [1], "T")


def test_check_dtype_offers_a_remedy():
    with pytest.raises(TypeError, match=r"page_table must have dtype int32, got int64\. Build it with from_rows\."):
        check_dtype("page_table", torch.zeros(1, dtype=torch.int64), torch.int32, remedy="Build it with from_rows.")


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_check_int_rejects_other_types(value):
    with pytest.raises(TypeError, match=r"page_size must be an int, got \w+\."):
        check_int("page_size", value, minimum=1)


def test_check_last_dim_contiguous_allows_other_strides():
    check_last_dim_contiguous("key", torch.zeros(4, 6, 8)[::2, 1:3])
    check_last_dim_contiguous("key", torch.zeros(0, 4).T)
    with pytest.raises(ValueError, match=r"key must have a contiguous last dimension \(stride 1\), got stride 8\."):
        check_last_dim_contiguous("key", torch.zeros(6, 8).T)


def test_check_floating_lets_quantised_pass_where_asked():
    for dtype in QUANTISED_DTYPES:
        check_floating("key_pages", torch.zeros(1, dtype=dtype), quantised=True)
        with pytest.raises(TypeError, match="key_pages must have dtype float32 or float16 or bfloat16, got"):
            check_floating("key_pages", torch.zeros(1, dtype=dtype))
    with pytest.raises(TypeError, match="key_pages must have dtype .* or float8_e5m2, got int16"):
        check_floating("key_pages", torch.zeros(1, dtype=torch.int16), quantised=True)
