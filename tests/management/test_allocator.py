import numpy as np
import pytest

from pagedkv import OutOfPagesError, PageAllocator


def test_fresh_pool_gives_pages_in_order():
    allocator = PageAllocator(5)
    assert allocator.allocate(2).tolist() == [0, 1]
    assert allocator.allocate(3).tolist() == [2, 3, 4]
    assert allocator.num_free == 0


def test_pages_freed_together_come_out_together():
    allocator = PageAllocator(8)
    allocator.allocate(8)
    allocator.free([6, 1])
    allocator.free([2, 3, 4])
    assert allocator.allocate(3).tolist() == [2, 3, 4]
    assert allocator.allocate(2).tolist() == [6, 1]


def test_allocate_more_than_free_changes_nothing():
    allocator = PageAllocator(4)
    allocator.allocate(3)
    with pytest.raises(OutOfPagesError, match="cannot allocate 2 pages: 1 free, 0 evictable, 3 pinned"):
        allocator.allocate(2)
    assert allocator.try_allocate(2) is None
    assert allocator.free_pages().tolist() == [3]


def test_allocate_nothing_is_empty():
    assert PageAllocator(1).allocate(0).tolist() == []


def test_shared_page_is_free_after_its_last_owner():
    allocator = PageAllocator(3)
    pages = allocator.allocate(3)
    allocator.retain(pages[1:])
    assert allocator.release(pages).tolist() == [0]
    assert [allocator.num_owners(page) for page in range(3)] == [0, 1, 1]
    assert allocator.release([2, 1]).tolist() == [2, 1]
    assert allocator.num_free == 3


@pytest.mark.parametrize("call", ["release", "retain", "free"])
@pytest.mark.parametrize(
    "pages, message",
    [
        ([0, 3], "must have an owner, got page 3, which is free"),
        ([0, 1, 0], "must name each page once, got page 0 twice"),
        ([0, 9], "must be in 0..3, got 9"),
        ([-1], "must be in 0..3, got -1"),
        (np.array([[0]]), r"must have shape \[n\], got \[1, 1\]"),
    ],
)
def test_wrong_pages_are_refused_before_anything_changes(call, pages, message):
    allocator = PageAllocator(4)
    allocator.allocate(3)
    before = allocator.owner_counts().tolist(), allocator.free_pages().tolist()
    with pytest.raises(ValueError, match=message):
        getattr(allocator, call)(pages)
    assert (allocator.owner_counts().tolist(), allocator.free_pages().tolist()) == before


def test_pages_must_be_integers():
    allocator = PageAllocator(4)
    allocator.allocate(1)
    with pytest.raises(TypeError, match="pages must be integers, got float64"):
        allocator.release([0.0])


def test_free_refuses_a_shared_page():
    allocator = PageAllocator(2)
    allocator.retain(allocator.allocate(1))
    with pytest.raises(ValueError, match="must have one owner to be freed, got page 0 with 2. Release it instead"):
        allocator.free([0])
    assert allocator.num_owners(0) == 2


@pytest.mark.parametrize("num_pages, error", [(0, ValueError), (-1, ValueError), (2**31, ValueError), (1.0, TypeError)])
def test_number_of_pages_is_checked(num_pages, error):
    with pytest.raises(error, match="num_pages must be"):
        PageAllocator(num_pages)
