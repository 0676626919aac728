"""The copies of a pool on a GPU, here between tensors of the CPU, and the order in which a stream is given them."""

from contextlib import contextmanager

import pytest
import torch

from pagedkv.storage import host_copies
from pagedkv.storage.host_copies import HostPages, NoStream, StagedCopies


def make_views():
    """As of a pool in order "layer_first": pages [N, layers, bytes] that do not lie together, and scales."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(256, (3, 10, 8), generator=generator, dtype=torch.uint8)
    return [numbers.movedim(1, 0), torch.randint(256, (10, 5), generator=generator, dtype=torch.uint8)]


def make_copies(views, stream=None, staging_bytes=2**20, slab_bytes=2**20):
    host = [HostPages(7, view.shape[1:], is_pinned=False, slab_bytes=slab_bytes) for view in views]
    return StagedCopies(views, host, stream or NoStream(), staging_bytes)


@pytest.mark.parametrize("staging_bytes", [1, 24, 50, 2**20])
@pytest.mark.parametrize("slab_bytes", [1, 24, 50, 2**20])
def test_pages_come_back_bit_for_bit_in_parts_of_any_size(staging_bytes, slab_bytes):
    views = make_views()
    before = [view.clone() for view in views]
    copies = make_copies(views, staging_bytes=staging_bytes, slab_bytes=slab_bytes)
    copies.save(torch.tensor([9, 0, 4, 3]), [0, 2, 3, 6])
    copies.save(torch.tensor([7]), [1])
    for view in views:
        view.zero_()
    copies.load([2, 6, 1], torch.tensor([5, 8, 0]))
    for view, was in zip(views, before, strict=True):
        expected = torch.zeros_like(was)
        expected[[5, 8, 0]] = was[[0, 3, 7]]
        assert torch.equal(view, expected)


def test_nothing_to_copy_copies_nothing():
    views = make_views()
    before = [view.clone() for view in views]
    copies = make_copies(views)
    copies.save(torch.tensor([], dtype=torch.int64), [])
    copies.load([], torch.tensor([], dtype=torch.int64))
    assert all(map(torch.equal, views, before))


def test_runs_are_what_lies_together_in_one_slab():
    pages = HostPages(10, (4,), is_pinned=False, slab_bytes=16)
    assert pages.pages_a_slab == 4
    found = [(part.start, part.stop, run.shape[0]) for part, run in pages.runs([1, 2, 3, 4, 5, 8, 9, 7, 0])]
    assert found == [(0, 3, 3), (3, 5, 2), (5, 7, 2), (7, 8, 1), (8, 9, 1)]
    assert list(pages.runs([])) == []


def test_a_page_larger_than_a_slab_has_one_of_its_own():
    pages = HostPages(2, (40,), is_pinned=False, slab_bytes=16)
    assert [run.shape for _, run in pages.runs([0, 1])] == [(1, 40), (1, 40)]


class WatchedStream(NoStream):
    """Notes when the current stream goes on."""

    def __init__(self):
        self.events = []
        self.kept = []

    def keep(self, tensor):
        self.kept.append(tensor)

    @contextmanager
    def running(self):
        self.events.append("begin")
        yield lambda: self.events.append("go on")
        self.events.append("end")


@pytest.fixture
def watched(monkeypatch):
    stream = WatchedStream()
    copy_pages = host_copies.copy_pages

    def noted(*args):
        stream.events.append("pages")
        copy_pages(*args)

    monkeypatch.setattr(host_copies, "copy_pages", noted)
    return stream


def test_what_computes_goes_on_when_the_last_page_was_read(watched):
    copies = make_copies(make_views(), watched, staging_bytes=48)
    copies.save(torch.tensor([9, 0, 4]), [0, 1, 2])
    # Three pages of 24 bytes, two at a time, then three of 5 at once.
    assert watched.events == ["begin", "pages", "pages", "pages", "go on", "end"]


def test_what_computes_goes_on_when_a_load_is_over(watched):
    copies = make_copies(make_views(), watched)
    copies.load([0, 1], torch.tensor([3, 4]))
    assert watched.events == ["begin", "pages", "pages", "end"]


def test_memory_that_the_stream_uses_is_kept_for_it(watched):
    views, ids = make_views(), torch.tensor([3])
    make_copies(views, watched).save(ids, [0])
    assert [tensor.data_ptr() for tensor in watched.kept] == [tensor.data_ptr() for tensor in (*views, ids)]
