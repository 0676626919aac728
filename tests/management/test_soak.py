"""A short part of the soak, and that it bites."""

from soak_programs import Program, soak

from pagedkv import IntegrityError, OutOfPagesError
from pagedkv.management.allocator import PageAllocator


def test_random_programs_lose_no_page_and_no_memory():
    done, growth = soak(10_000_000, seconds=10)
    assert done >= 20_000
    assert growth < 64e6


def test_a_page_that_is_lost_is_found(monkeypatch):
    push = PageAllocator._push

    def lose_one(self, pages):
        push(self, pages[1:] if pages.shape[0] > 3 else pages)

    monkeypatch.setattr(PageAllocator, "_push", lose_one)
    found = 0
    for seed in range(10):
        try:
            Program(seed).run(500)
        except (IntegrityError, AssertionError, OutOfPagesError):
            found += 1
    assert found >= 5
