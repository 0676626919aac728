"""gather_kv on the Triton back end: what the conformance cases do not reach by themselves."""

import pytest
import torch

import pagedkv
from pagedkv.kernels.triton import gather_kv
from pagedkv.kernels.triton.move_kernel import Form, vector_bytes
from pagedkv.kernels.triton.runtime import IS_INTERPRETED
from pagedkv.testing.conformance import ConformanceCase
from pagedkv.testing.conformance.bit_patterns import bit_patterns
from pagedkv.testing.conformance.judge import assert_same, moves_as_reference, placed
from pagedkv.testing.page_views import PAGE_FORMS, kv_page_views

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
F16, BF16, I8 = torch.float16, torch.bfloat16, torch.int8


def assert_as_reference(make):
    ConformanceCase("gather_kv", "gather", moves_as_reference(pagedkv.gather_kv, make))("triton", DEVICE)


def arguments(slots, *, num_pages=6, page_size=16, heads=3, dims=(64, 64), dtype=BF16, layout="NHD", form="separate"):
    shape = {"num_pages": num_pages, "page_size": page_size, "num_kv_heads": heads, "dtype": dtype}
    pages = kv_page_views(form, layout, **shape, head_dim=dims[0], value_dim=dims[1])
    for view in pages:
        view.copy_(bit_patterns(*view.shape, dtype=dtype))
    return {"key_pages": pages[0], "value_pages": pages[1], "slots": slots, "layout": layout}


@pytest.mark.parametrize("form", PAGE_FORMS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dims", [(64, 64), (24, 40), (13, 80)], ids=str)
def test_rows_of_all_forms_are_read_bit_for_bit(dims, layout, form):
    slots = torch.randint(-3, 96, (130,))
    assert_as_reference(lambda: arguments(slots, dims=dims, layout=layout, form=form, dtype=F16))


@pytest.mark.parametrize("heads, dims", [(1, (576, 512)), (40, (128, 128)), (5, (0, 24)), (5, (24, 0)), (8, (1, 1))])
def test_rows_of_more_and_of_fewer_vectors_than_a_tile(heads, dims):
    assert_as_reference(lambda: arguments(torch.randint(-2, 96, (37,)), heads=heads, dims=dims, layout="HND"))


# Elements before the first one, the width of a head, and the bytes of a vector that follow for bfloat16.
ALIGNMENTS = [(0, 16, 16), (8, 16, 16), (4, 16, 8), (2, 16, 4), (1, 16, 2), (0, 20, 8), (0, 18, 4), (0, 7, 2)]


@pytest.mark.parametrize("offset, dim, num_bytes", ALIGNMENTS, ids=str)
def test_vectors_are_as_wide_as_addresses_and_widths_allow(offset, dim, num_bytes):
    call = arguments(torch.tensor([95, -1, 0, 40, 40]), dims=(dim, dim))
    for name in ("key_pages", "value_pages"):
        shape = call[name].shape
        call[name] = bit_patterns(shape.numel() + offset, dtype=BF16)[offset:].view(shape)
    assert vector_bytes(*(Form.of(call[name]) for name in ("key_pages", "value_pages"))) == num_bytes
    assert_as_reference(lambda: call)


def test_slots_out_of_range_that_are_not_refused_give_zeros(monkeypatch):
    monkeypatch.setattr(gather_kv, "checks_bounds", lambda: False)
    slots = torch.tensor([5, 96, 2**31 + 3, 7, 2**32 + 5, 2**62, 95])
    call = arguments(slots)
    there = placed(call, torch.device(DEVICE))
    expected = pagedkv.gather_kv(**{**call, "slots": slots.masked_fill(slots >= 96, -1)}, backend="reference")
    for name, read, wanted in zip(
        ("key", "value"), pagedkv.gather_kv(**there, backend="triton"), expected, strict=True
    ):
        assert_same(name, read, wanted)


def test_slots_out_of_range_are_refused_by_request(monkeypatch):
    monkeypatch.setenv("PAGEDKV_DEBUG", "1")
    call = placed(arguments(torch.tensor([0, 5, 97])), torch.device(DEVICE))
    with pytest.raises(ValueError, match=r"slots must be below 96 \(N \* P slots\), got 97 at entry 2\."):
        pagedkv.gather_kv(**call, backend="triton")


@pytest.mark.parametrize("num_tokens, num_pages, dims", [(0, 4, (8, 8)), (3, 0, (8, 8)), (3, 4, (0, 0))])
def test_nothing_and_slots_of_no_page(num_tokens, num_pages, dims):
    assert_as_reference(lambda: arguments(torch.full((num_tokens,), -1), num_pages=num_pages, dims=dims, dtype=I8))
