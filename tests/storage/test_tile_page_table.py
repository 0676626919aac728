import sys
import threading

import pytest
import torch

from pagedkv.storage.tiles.tile_page_table import TilePageTable


@pytest.fixture
def defaults():
    """Another default device and dtype: a tensor that is made by default does not fit then."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_new_table_is_empty_on_both_sides():
    table = TilePageTable(2, 3, 4)
    assert table.host.shape == table.device_table.shape == (2, 3, 4)
    assert table.host.dtype == table.device_table.dtype == torch.int32
    assert (table.num_beams, table.num_heads, table.num_tiles, table.device) == (2, 3, 4, torch.device("cpu"))
    assert torch.equal(table.host, torch.full((2, 3, 4), -1, dtype=torch.int32))
    assert torch.equal(table.device_table, table.host)
    assert table.num_synced == 0


def test_device_table_is_a_tensor_of_its_own():
    table = TilePageTable(1, 1, 2)
    table.assign(0, 0, 1, 5)
    assert table.device_table.data_ptr() != table.host.data_ptr()
    assert table.device_table.tolist() == [[[-1, 5]]]


def test_lookup_assign_remove():
    table = TilePageTable(2, 3, 4)
    table.assign(1, 2, 3, page=2**31 - 1)
    table.assign(0, 0, 0, page=0)
    assert table.lookup(1, 2, 3) == 2**31 - 1
    assert table.remove(1, 2, 3) == 2**31 - 1
    assert table.lookup(1, 2, 3) == -1
    assert table.remove(1, 2, 3) == -1
    table.assign(0, 0, 0, page=7)
    assert torch.equal(table.device_table, table.host)
    assert table.host[0, 0, 0] == 7
    table.clear()
    assert (table.host == -1).all()
    assert torch.equal(table.device_table, table.host)


def test_sync_uploads_from_the_first_to_the_last_change():
    table = TilePageTable(2, 3, 4)
    assert table.sync() == 0
    table.assign(0, 1, 2, page=9)  # entry 6
    assert table.sync() == 1
    table.assign(0, 1, 0, page=4)  # entry 4
    table.assign(1, 0, 1, page=5)  # entry 13
    assert table.sync() == 10
    assert (table.num_syncs, table.num_synced) == (2, 11)
    assert table.sync() == 0
    assert torch.equal(table.device_table, table.host)
    assert (table.num_syncs, table.num_synced) == (2, 11)


def test_sync_leaves_the_rest_of_the_device_alone():
    table = TilePageTable(1, 1, 5)
    table.device_table[0, 0] = 77
    table.assign(0, 0, 1, page=1)
    table.assign(0, 0, 3, page=3)
    assert table.device_table.tolist() == [[[77, 1, -1, 3, 77]]]


def test_remove_of_nothing_uploads_nothing():
    table = TilePageTable(1, 1, 5)
    table.remove(0, 0, 3)
    assert table.sync() == 0


def test_assign_batch_last_duplicate_wins():
    table = TilePageTable(3, 2, 4)
    beams, heads, tiles = torch.tensor([[0, 2, 0], [1, 0, 1], [3, 1, 3]])
    table.assign_batch(beams, heads, tiles, torch.tensor([10, 11, 12]))
    assert table.lookup(0, 1, 3) == 12
    assert table.lookup(2, 0, 1) == 11
    assert int((table.host >= 0).sum()) == 2
    assert torch.equal(table.device_table, table.host)
    assert table.num_synced == 17 - 7 + 1


def test_assign_batch_of_none():
    table = TilePageTable(1, 1, 1)
    none = torch.zeros(0, dtype=torch.int64)
    table.assign_batch(none, none, none, none)
    assert table.sync() == 0


@pytest.mark.parametrize(
    "index, message",
    [
        ((2, 0, 0), "beam must be in 0..1, got 2"),
        ((-1, 0, 0), "beam must be in 0..1, got -1"),
        # Both would be entries of the table if only the flat index counted.
        ((0, 3, 0), "head must be in 0..2, got 3"),
        ((0, 0, 4), "tile must be in 0..3, got 4"),
        ((0, 1, -1), "tile must be in 0..3, got -1"),
    ],
)
def test_index_outside_is_refused_by_name(index, message):
    table = TilePageTable(2, 3, 4)
    for call in (table.lookup, table.remove, lambda *index: table.assign(*index, page=1)):
        with pytest.raises(ValueError, match=message):
            call(*index)
    name = message.split()[0] + "s"
    columns = [torch.tensor([0, number]) for number in (*index, 1)]
    with pytest.raises(ValueError, match=f"{name}{message[4:]} at entry 1"):
        table.assign_batch(*columns)
    assert (table.host == -1).all()
    assert table.sync() == 0


@pytest.mark.parametrize("page", [-1, 2**31])
def test_page_that_int32_cannot_hold_or_that_means_none_is_refused(page):
    table = TilePageTable(1, 1, 1)
    with pytest.raises(ValueError, match=f"page must be in 0..2147483647, got {page}"):
        table.assign(0, 0, 0, page)
    with pytest.raises(ValueError, match=f"pages must be in 0..2147483647, got {page} at entry 0"):
        table.assign_batch(*torch.zeros(3, 1, dtype=torch.int64), torch.tensor([page]))


def test_types_are_refused():
    table = TilePageTable(1, 1, 1)
    with pytest.raises(TypeError, match="tile must be an int, got float"):
        table.lookup(0, 0, 0.0)
    with pytest.raises(TypeError, match="head must be an int, got bool"):
        table.assign(0, False, 0, 0)
    index = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(TypeError, match="heads must have dtype int64, got int32"):
        table.assign_batch(index, index.int(), index, index)
    with pytest.raises(ValueError, match=r"tiles must have shape \[n\] with n = 1 \(set by beams\), got \[2\]"):
        table.assign_batch(index, index, index.repeat(2), index)
    with pytest.raises(ValueError, match="pages must be on the CPU, got meta"):
        table.assign_batch(index, index, index, index.to("meta"))


@pytest.mark.parametrize("name", ["num_beams", "num_heads", "num_tiles"])
def test_empty_table_is_refused(name):
    sizes = {"num_beams": 1, "num_heads": 1, "num_tiles": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TilePageTable(**sizes)


def test_table_is_written_inside_and_outside_of_inference_mode():
    with torch.inference_mode():
        table = TilePageTable(1, 1, 2)
        table.assign(0, 0, 0, 3)
        table.sync()
    table.assign(0, 0, 1, 4)
    assert table.device_table.tolist() == [[[3, 4]]]


def test_uploads_of_another_thread_lose_no_change():
    """The other thread uploads in the middle of every change, as far as it may."""
    table, stop = TilePageTable(1, 1, 64), threading.Event()

    def upload():
        while not stop.is_set():
            table.sync()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=upload)
    thread.start()
    try:
        for number in range(2000):
            table.assign(0, 0, number * 7 % 64, number)
            if number % 50 == 49:
                assert torch.equal(table.device_table, table.host)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_upload_waits_for_a_change_that_is_under_way(monkeypatch):
    table, mark = TilePageTable(1, 1, 4), TilePageTable._mark
    uploads = []

    def marked(self, first, stop):
        mark(self, first, stop)
        thread = threading.Thread(target=lambda: uploads.append(table.sync()))
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()

    monkeypatch.setattr(TilePageTable, "_mark", marked)
    table.assign(0, 0, 2, page=5)
    monkeypatch.undo()
    assert table.device_table.tolist() == [[[-1, -1, 5, -1]]]


def test_default_device_and_dtype_change_nothing(defaults):
    table = TilePageTable(1, 1, 2)
    table.assign(0, 0, 1, 3)
    assert table.device_table.device.type == table.host.device.type == "cpu"
    assert table.device_table.tolist() == [[[-1, 3]]]
