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


def test_reserved_pages_are_nobodys():
    allocator = PageAllocator(5, num_reserved=2)
    assert allocator.reserved_pages.tolist() == [0, 1]
    assert (allocator.num_pages, allocator.num_free, allocator.num_reserved) == (5, 3, 2)
    assert allocator.allocate(3).tolist() == [2, 3, 4]
    assert allocator.try_allocate(1) is None
    for call in (allocator.release, allocator.retain, allocator.free):
        with pytest.raises(ValueError, match=r"pages must not be reserved \(0..1\), got page 1"):
            call([2, 1])
    assert allocator.owner_counts().tolist() == [1] * 5


@pytest.mark.parametrize("num_reserved, message", [(-1, "at least 0, got -1"), (4, r"below 4 \(num_pages\), got 4")])
def test_number_of_reserved_pages_is_checked(num_reserved, message):
    with pytest.raises(ValueError, match=f"num_reserved must be {message}"):
        PageAllocator(4, num_reserved)


def test_runs_of_free_pages():
    allocator = PageAllocator(10)
    assert allocator.free_runs() == (1, 10)
    allocator.allocate(10)
    assert allocator.free_runs() == (0, 0)
    allocator.free([0, 4, 5, 6, 8, 9])
    assert allocator.free_runs() == (3, 3)


def test_sorted_free_pages_come_out_in_the_order_of_ids():
    allocator = PageAllocator(6)
    allocator.allocate(6)
    allocator.free([5, 0, 3])
    allocator.sort_free()
    assert allocator.allocate(3).tolist() == [0, 3, 5]


def test_extra_owners_are_counted():
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    allocator.retain(pages[:2])
    allocator.retain(pages[:1])
    assert allocator.num_extra_owners == 3
    allocator.release(pages)
    assert allocator.num_extra_owners == 1
    allocator.release(pages[:1])
    assert allocator.num_extra_owners == 0


def test_release_of_distinct_pages_refuses_a_free_one_too():
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    with pytest.raises(ValueError, match="must have an owner, got page 2, which is free"):
        allocator.release_distinct(np.array([0, 2], np.int32))
    assert allocator.release_distinct(pages).tolist() == [0, 1]
