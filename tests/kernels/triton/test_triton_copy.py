"""copy_pages on the Triton back end: what the conformance cases do not reach by themselves."""

import pytest
import torch

import pagedkv
from pagedkv.kernels.triton import copy_pages
from pagedkv.kernels.triton.runtime import IS_INTERPRETED
from pagedkv.testing.conformance import ConformanceCase
from pagedkv.testing.conformance.bit_patterns import bit_patterns
from pagedkv.testing.conformance.judge import assert_same_memory, moves_as_reference, placed

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
F32, F16, I8 = torch.float32, torch.float16, torch.int8


def assert_as_reference(make):
    ConformanceCase("copy_pages", "copy", moves_as_reference(pagedkv.copy_pages, make))("triton", DEVICE)


def bits(*shape):
    return bit_patterns(*shape, dtype=F16)


def launches_of(src_pages, dst_pages):
    ids = torch.tensor([1, 4])
    return copy_pages._launches(src_pages, dst_pages, ids, ids, 4)


# Two tensors of pages, the bytes of a vector and the vectors of a run that follow.
FORMS = {
    "whole pages": (lambda: (bits(8, 4, 2, 8), bits(8, 4, 2, 8)), 16, 8),
    "a pool of all layers": (lambda: (bits(6, 8, 64).transpose(0, 1), bits(8, 6, 64)), 16, 8),
    "heads first": (lambda: (bits(8, 2, 4, 8).transpose(1, 2), bits(8, 2, 4, 8).transpose(1, 2)), 16, 8),
    "heads first on one side": (lambda: (bits(8, 2, 4, 8).transpose(1, 2), bits(8, 4, 2, 8)), 16, 1),
    "gaps after rows": (lambda: (bits(8, 4, 2, 8), bits(8, 4, 2, 12)[..., :8]), 8, 2),
    "gaps after heads": (lambda: (bits(8, 4, 3, 8)[:, :, :2], bits(8, 4, 2, 8)), 16, 2),
    "an odd start": (lambda: (bits(8, 4, 2, 8), bits(8 * 64 + 1)[1:].view(8, 4, 2, 8)), 2, 64),
    "an even start": (lambda: (bits(8 * 64 + 2)[2:].view(8, 4, 2, 8), bits(8, 4, 2, 8)), 4, 32),
    "an odd width": (lambda: (bits(8, 5, 3), bits(8, 5, 3)), 2, 15),
    "no run": (lambda: (bits(8, 4, 2, 16)[..., ::2], bits(8, 4, 2, 8)), 2, 1),
    "all dims turned": (lambda: (bits(8, 4, 2, 8).permute(0, 3, 2, 1), bits(8, 8, 2, 4)), 2, 1),
    "one expanded source": (lambda: (bits(8, 1, 1, 8).expand(8, 4, 2, 8), bits(8, 4, 2, 8)), 16, 1),
    "numbers": (lambda: (bits(8), bits(9)[1:]), 2, 1),
    "every other page": (lambda: (bits(16, 8)[::2], bits(8, 8)), 16, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_pages_of_all_forms_are_copied_in_the_widest_vectors(form):
    make, num_bytes, run = FORMS[form]
    src_pages, dst_pages = make()
    (launch,) = launches_of(src_pages, dst_pages)
    assert launch.constexprs["RUN"] == run
    assert launch.constexprs["WIDTH"] * num_bytes == src_pages[0].numel() * 2
    ids = {"src": torch.tensor([5, 0, 5, 7]), "dst": torch.tensor([1, 3, 0, 7])}
    assert_as_reference(lambda: {"src_pages": src_pages, "dst_pages": dst_pages, **ids})


def test_pages_of_many_dims_that_cannot_be_joined_take_several_launches():
    src_pages, dst_pages = bits(4, 4, 3, 4, 6, 3)[:, :3, :2, :3, :5], bits(4, 3, 2, 3, 5, 6)[..., ::2]
    assert len(launches_of(src_pages, dst_pages)) == 3
    ids = {"src": torch.tensor([3, 0]), "dst": torch.tensor([1, 3])}
    assert_as_reference(lambda: {"src_pages": src_pages, "dst_pages": dst_pages, **ids})


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
@pytest.mark.parametrize("num_copies, width", [(8, 2000), (1500, 3)])
def test_views_that_share_bytes_are_read_before_they_are_written(num_copies, width, shift):
    """Page i of one is page i + shift of the other: copied one by one, some would be read after they are written."""

    def make():
        pages = bits(num_copies + 4, width)
        src_pages, dst_pages = pages[2 : 2 + num_copies], pages[2 + shift : 2 + shift + num_copies]
        order = torch.arange(num_copies)
        return {"src_pages": src_pages, "dst_pages": dst_pages, "src": order, "dst": order}

    assert_as_reference(make)


def test_interleaved_views_of_one_buffer_are_told_apart():
    pages = bits(6, 2, 16)
    call = {"src_pages": pages[:, 0], "dst_pages": pages[:, 1], "src": torch.arange(6), "dst": torch.randperm(6)}
    assert_as_reference(lambda: call)


@pytest.mark.parametrize("shares_bytes", [False, True])
def test_ids_out_of_range_that_are_not_refused_are_skipped(shares_bytes, monkeypatch):
    monkeypatch.setattr(copy_pages, "checks_bounds", lambda: False)
    pages = bits(16, 3, 8)
    views = (pages[1:9], pages[:8]) if shares_bytes else (pages[:8], pages[8:])
    call = {"src_pages": views[0], "dst_pages": views[1], "src": torch.tensor([3, 8, -1, 2**32, 2**40, 1, 6])}
    call["dst"] = torch.tensor([0, 1, 2, 3, 4, 8, 5])
    expected, actual = placed(call, torch.device("cpu")), placed(call, torch.device(DEVICE))
    good = torch.tensor([0, 6])
    views = expected["src_pages"], expected["dst_pages"]
    pagedkv.copy_pages(*views, call["src"][good], call["dst"][good], backend="reference")
    pagedkv.copy_pages(**actual, backend="triton")
    assert_same_memory(actual, expected)


def test_ids_out_of_range_are_refused_by_request(monkeypatch):
    monkeypatch.setenv("PAGEDKV_DEBUG", "1")
    pages = bits(8, 4).to(DEVICE)
    ids = torch.tensor([0, 8]).to(DEVICE), torch.tensor([1, 2]).to(DEVICE)
    with pytest.raises(ValueError, match=r"src must be in \[0, 8\) \(the pages of src_pages\), got 8 at entry 1\."):
        pagedkv.copy_pages(pages, pages, *ids, backend="triton")
    with pytest.raises(ValueError, match=r"dst must not name a page of src within one tensor, got page 1 in both\."):
        pagedkv.copy_pages(pages, pages, ids[1], ids[1], backend="triton")


def test_a_page_of_more_vectors_than_a_tile_and_many_small_pages():
    large, small = bits(3, 70_001), bits(5000, 5)
    assert_as_reference(
        lambda: {"src_pages": large, "dst_pages": large, "src": torch.tensor([2]), "dst": torch.tensor([0])}
    )
    src, dst = torch.randperm(5000).chunk(2)
    assert_as_reference(lambda: {"src_pages": small, "dst_pages": small, "src": src, "dst": dst})


@pytest.mark.parametrize("shape, num_copies", [((4, 0, 8), 2), ((4, 8), 0)])
def test_nothing_is_copied(shape, num_copies):
    ids = torch.arange(num_copies)
    assert_as_reference(lambda: {"src_pages": bits(*shape), "dst_pages": bits(*shape), "src": ids, "dst": ids})


def test_pages_are_marked_as_written():
    pages = bits(8, 4).to(DEVICE)
    before = pages._version
    pagedkv.copy_pages(pages, pages, torch.tensor([0]).to(DEVICE), torch.tensor([1]).to(DEVICE), backend="triton")
    assert pages._version > before
