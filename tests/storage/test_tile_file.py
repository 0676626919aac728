import errno
import io
import itertools
import os
import resource
import struct
import threading
import zlib
from dataclasses import replace

import pytest
import torch

from pagedkv.storage.tiles import TileGeometry, tile_file
from pagedkv.storage.tiles.tile_file import read_tile_file, write_tile_file
from pagedkv.storage.tiles.tile_record import HOST, POOL, TileRecord
from pagedkv.testing.bits import same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def random_bits(shape, dtype):
    """Every bit pattern, those of NaN, infinities and denormals among them."""
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).view(dtype).view(shape)


def make_record(kind=HOST, dtype=torch.float32, num_stored=3, tile_size=4, head_dim=5, value_dim=5, num_extra=2):
    """Tiles named from the last to the first, and names of `num_extra` later sequences that share the first."""
    geometry = TileGeometry(tile_size, head_dim, value_dim, dtype)
    own = [(7, 1, i // 2, i % 2) if kind == HOST else (7, 1, i, 2) for i in reversed(range(num_stored))]
    shared = [(8 + i, *own[-1][1:]) for i in range(num_extra if num_stored else 0)]
    named = [*reversed(range(num_stored)), *([0] * len(shared))]
    names = torch.tensor([*own, *shared], dtype=torch.int64).view(-1, 4)
    dims = (head_dim,) if kind == HOST else (head_dim, value_dim)
    tiles = [random_bits((num_stored, tile_size, dim), dtype) for dim in dims]
    tiles += [random_bits((num_stored, tile_size), torch.float32) for _ in dims if dtype == torch.int8]
    return TileRecord(kind, geometry, names, torch.tensor(named, dtype=torch.int64), tuple(tiles))


def read_like(path, record, **changes):
    fits = {"kind": record.kind, "geometry": record.geometry, "capacity": len(record.tiles[0])}
    return read_tile_file(path, **{**fits, **changes})


def assert_same(a, b):
    assert (a.kind, a.geometry) == (b.kind, b.geometry)
    assert same_bits(a.names, b.names)
    assert same_bits(a.named, b.named)
    assert len(a.tiles) == len(b.tiles)
    for one, other in zip(a.tiles, b.tiles, strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("num_stored", [0, 1, 3, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [HOST, POOL])
def test_round_trip_keeps_every_bit_and_the_order(tmp_path, kind, dtype, num_stored):
    record = make_record(kind, dtype, num_stored, tile_size=3, head_dim=7, value_dim=7 if kind == HOST else 2)
    write_tile_file(tmp_path / "a.tiles", record)
    assert_same(read_like(tmp_path / "a.tiles", record), record)


@pytest.mark.parametrize("sizes", list(itertools.product((1, 16), (1, 13), (1, 64))), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_round_trip_of_other_sizes(tmp_path, dtype, sizes):
    tile_size, head_dim, value_dim = sizes
    record = make_record(POOL, dtype, 5, tile_size, head_dim, value_dim)
    write_tile_file(tmp_path / "a.tiles", record)
    assert_same(read_like(tmp_path / "a.tiles", record), record)


def test_nan_payloads_survive(tmp_path):
    record = make_record(num_stored=1, tile_size=1, head_dim=2, value_dim=2)
    nans = torch.tensor([0x7FC0_1234, -0x0040_0001], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    record.tiles[0].copy_(nans)
    write_tile_file(tmp_path / "a.tiles", record)
    assert read_like(tmp_path / "a.tiles", record).tiles[0].view(torch.int32).tolist() == [
        [[0x7FC0_1234, -0x0040_0001]]
    ]


def test_every_byte_is_where_the_format_says(tmp_path):
    names, named = torch.tensor([[5, 2, 9, 2], [6, 2, 9, 2]]), torch.tensor([0, 0])
    key, value = torch.tensor([[[1, -2, 3]]], dtype=torch.int8), torch.tensor([[[-4]]], dtype=torch.int8)
    scales = torch.tensor([[0.5]]), torch.tensor([[-2.0]])
    record = TileRecord(POOL, TileGeometry(1, 3, 1, torch.int8), names, named, (key, value, *scales))
    write_tile_file(tmp_path / "a.tiles", record)

    tile = [struct.pack("<3b", 1, -2, 3), struct.pack("<b", -4), struct.pack("<f", 0.5), struct.pack("<f", -2.0)]
    checksum = zlib.crc32(struct.pack("<Q", 0) + b"".join(tile))
    index = struct.pack("<8q2qI", 5, 2, 9, 2, 6, 2, 9, 2, 0, 0, checksum)
    fields = struct.pack("<4I3Q2Q", 0x01020304, 1, 2, 4, 1, 3, 1, 2, 1)
    sections = struct.pack("<4QI24x", 128, 84, 212, 12, zlib.crc32(index))
    header = b"\x89PKV\r\n\x1a\n" + fields + sections
    header += struct.pack("<I", zlib.crc32(header))
    assert (tmp_path / "a.tiles").read_bytes() == header + index + b"".join(tile)


def test_tensors_read_are_new_and_may_be_written(tmp_path):
    record = make_record(POOL, torch.int8)
    write_tile_file(tmp_path / "a.tiles", record)
    for tensor in read_like(tmp_path / "a.tiles", record).tiles:
        assert tensor.is_contiguous()
        tensor.zero_()
    assert_same(read_like(tmp_path / "a.tiles", record), record)


def test_file_within_capacity_exactly_full_and_one_more(tmp_path):
    record = make_record(num_stored=4)
    write_tile_file(tmp_path / "a.tiles", record)
    assert_same(read_like(tmp_path / "a.tiles", record, capacity=5), record)
    assert_same(read_like(tmp_path / "a.tiles", record, capacity=4), record)
    with pytest.raises(ValueError, match="a.tiles must be at most the capacity 3, got 4"):
        read_like(tmp_path / "a.tiles", record, capacity=3)


@pytest.mark.parametrize("kind", [HOST, POOL])
def test_names_within_their_bound_exactly_full_and_one_more(tmp_path, kind):
    record = make_record(kind, num_stored=3, num_extra=2)
    write_tile_file(tmp_path / "a.tiles", record)
    for max_names in (None, 6, 5):
        assert_same(read_like(tmp_path / "a.tiles", record, max_names=max_names), record)
    with pytest.raises(ValueError, match="names of tile file .*a.tiles must be at most 4, .* got 5"):
        read_like(tmp_path / "a.tiles", record, max_names=4)


@pytest.mark.parametrize("num_stored", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [HOST, POOL])
def test_default_device_of_the_caller_does_not_matter(tmp_path, kind, dtype, num_stored):
    record = make_record(kind, dtype, num_stored)
    with torch.device("meta"):
        write_tile_file(tmp_path / "a.tiles", record)
        found = read_like(tmp_path / "a.tiles", record)
    assert {tensor.device.type for tensor in (found.names, found.named, *found.tiles)} == {"cpu"}
    assert_same(found, record)


def test_writing_replaces_the_file_and_leaves_no_other(tmp_path):
    for num_stored in (3, 1, 5):
        record = make_record(num_stored=num_stored)
        write_tile_file(tmp_path / "a.tiles", record)
        assert_same(read_like(tmp_path / "a.tiles", record), record)
    assert os.listdir(tmp_path) == ["a.tiles"]


@pytest.mark.parametrize("as_path", [str, os.fsencode, lambda path: path], ids=["str", "bytes", "Path"])
def test_a_path_of_every_kind(tmp_path, as_path):
    record = make_record()
    write_tile_file(as_path(tmp_path / "a.tiles"), record)
    assert_same(read_like(as_path(tmp_path / "a.tiles"), record), record)


def test_a_name_as_long_as_names_can_be_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = make_record()
    write_tile_file("a" * 255, record)
    assert_same(read_like("a" * 255, record), record)


def test_symbolic_link_is_followed_and_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "a.tiles").symlink_to(tmp_path / "far" / "b.tiles")
    record = make_record()
    for _ in range(2):
        write_tile_file(tmp_path / "a.tiles", record)
        assert (tmp_path / "a.tiles").is_symlink()
        assert_same(read_like(tmp_path / "far" / "b.tiles", record), record)
    assert os.listdir(tmp_path / "far") == ["b.tiles"]


def test_new_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_tile_file(tmp_path / "a.tiles", make_record())
    finally:
        os.umask(before)
    assert (tmp_path / "a.tiles").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o777], ids=oct)
def test_file_that_is_replaced_keeps_its_permissions(tmp_path, mode):
    (tmp_path / "a.tiles").touch()
    (tmp_path / "a.tiles").chmod(mode)
    (tmp_path / "link").symlink_to(tmp_path / "a.tiles")
    record = make_record()
    for name in ("a.tiles", "link"):
        write_tile_file(tmp_path / name, record)
        assert (tmp_path / "a.tiles").stat().st_mode & 0o7777 == mode
        assert_same(read_like(tmp_path / "a.tiles", record), record)


def test_set_user_id_is_not_handed_on_to_whoever_writes(tmp_path):
    (tmp_path / "a.tiles").touch()
    (tmp_path / "a.tiles").chmod(0o6750)
    write_tile_file(tmp_path / "a.tiles", make_record())
    assert (tmp_path / "a.tiles").stat().st_mode & 0o7777 == 0o750


def test_nobody_else_may_read_a_private_file_while_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "a.tiles").touch()
    (tmp_path / "a.tiles").chmod(0o600)
    seen, write, fchmod = [], os.write, os.fchmod

    def looking(call):
        def look(file, *args):
            seen.append(os.fstat(file).st_mode & 0o777)
            return call(file, *args)

        return look

    monkeypatch.setattr(os, "write", looking(write))
    monkeypatch.setattr(os, "fchmod", looking(fchmod))
    write_tile_file(tmp_path / "a.tiles", make_record())
    assert set(seen) == {0o600}


def test_file_is_on_the_disk_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    calls = []

    def logged(name, call):
        def log(*args):
            calls.append((name, "folder" if name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}") else "file"))
            return call(*args)

        monkeypatch.setattr(os, name, log)

    for name in ("write", "fsync", "replace"):
        logged(name, getattr(os, name))
    write_tile_file(tmp_path / "a.tiles", make_record())
    assert [call for call in calls if call[0] != "write"] == [
        ("fsync", "file"),
        ("replace", "file"),
        ("fsync", "folder"),
    ]
    assert calls.index(("fsync", "file")) > max(i for i, call in enumerate(calls) if call[0] == "write")


class Failing:
    """A function of os that fails at its `at`-th call, and works again after."""

    def __init__(self, call, at, error):
        self.call, self.left, self.error = call, at, error

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.call(*args)


FAULTS = [("write", 1), ("write", 2), ("write", 5), ("write", 6), ("fsync", 1), ("replace", 1)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("name, at", FAULTS)
@pytest.mark.parametrize("old", [True, False], ids=["replacing", "new"])
def test_failure_keeps_the_old_file_and_no_other(tmp_path, monkeypatch, old, name, at, error):
    first, second = make_record(num_stored=2), make_record(POOL, num_stored=4)
    if old:
        write_tile_file(tmp_path / "a.tiles", first)
    with monkeypatch.context() as patched:
        failing = Failing(getattr(os, name), at, error)
        patched.setattr(os, name, failing)
        with pytest.raises(type(error)):
            write_tile_file(tmp_path / "a.tiles", second)
    assert failing.left <= 0
    assert os.listdir(tmp_path) == (["a.tiles"] if old else [])
    if old:
        assert_same(read_like(tmp_path / "a.tiles", first), first)


def test_folder_that_cannot_be_synced_is_reported_with_the_new_file_in_place(tmp_path, monkeypatch):
    record = make_record()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", Failing(os.fsync, 2, OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output error"):
            write_tile_file(tmp_path / "a.tiles", record)
    assert os.listdir(tmp_path) == ["a.tiles"]
    assert_same(read_like(tmp_path / "a.tiles", record), record)


def test_disk_that_is_full_in_the_middle(tmp_path):
    """The kernel's own refusal, after a write that was cut short: a limit on the size of files."""
    old, large = make_record(num_stored=2), make_record(num_stored=64, tile_size=16, head_dim=64, value_dim=64)
    write_tile_file(tmp_path / "a.tiles", old)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tile_file(tmp_path / "a.tiles", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["a.tiles"]
    assert_same(read_like(tmp_path / "a.tiles", old), old)
    write_tile_file(tmp_path / "a.tiles", large)
    assert_same(read_like(tmp_path / "a.tiles", large), large)


def test_no_file_stays_open(tmp_path, monkeypatch):
    record = make_record()
    before = sorted(os.listdir("/proc/self/fd"))
    write_tile_file(tmp_path / "a.tiles", record)
    read_like(tmp_path / "a.tiles", record)
    with pytest.raises(ValueError, match="capacity"):
        read_like(tmp_path / "a.tiles", record, capacity=0)
    monkeypatch.setattr(os, "write", Failing(os.write, 3, OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_tile_file(tmp_path / "a.tiles", record)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_writes_and_reads_that_the_system_cuts_short(tmp_path, monkeypatch):
    class Slow(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(buffer[:5])

    write = os.write
    record = make_record(POOL, torch.int8)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda file, chunk: write(file, chunk[:7]))
        write_tile_file(tmp_path / "a.tiles", record)
    assert_same(read_like(tmp_path / "a.tiles", record), record)
    monkeypatch.setattr(
        tile_file, "open", lambda path, mode, buffering, opener: Slow(path, opener=opener), raising=False
    )
    assert_same(read_like(tmp_path / "a.tiles", record), record)


def test_writers_of_one_file_at_once_leave_one_of_their_files(tmp_path):
    records = [make_record(num_stored=n, tile_size=16, head_dim=32, value_dim=32) for n in (1, 2, 3, 4)]
    failures = []

    def write(record):
        try:
            for _ in range(10):
                write_tile_file(tmp_path / "a.tiles", record)
                found = read_like(tmp_path / "a.tiles", record, capacity=4)
                assert_same(found, records[len(found.tiles[0]) - 1])
        except Exception as error:  # noqa: BLE001 - told to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=write, args=(record,)) for record in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.listdir(tmp_path) == ["a.tiles"]


def test_writing_where_no_file_can_be(tmp_path):
    record = make_record()
    with pytest.raises(FileNotFoundError, match="none"):
        write_tile_file(tmp_path / "none" / "a.tiles", record)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(NotADirectoryError, match="file"):
        write_tile_file(tmp_path / "file" / "a.tiles", record)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write_tile_file(tmp_path / "folder", record)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file: .*fifo"):
        write_tile_file(tmp_path / "fifo", record)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_reading_what_is_no_file(tmp_path):
    record = make_record()
    with pytest.raises(FileNotFoundError, match="none"):
        read_like(tmp_path / "none", record)
    with pytest.raises(IsADirectoryError):
        read_like(tmp_path, record)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file: .*fifo"):
        read_like(tmp_path / "fifo", record)
    with pytest.raises(OSError, match="not a regular file: '/dev/zero'"):
        read_like("/dev/zero", record)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        read_like(tmp_path / "loop", record)


def test_arguments_of_reading_are_checked(tmp_path):
    record = make_record()
    write_tile_file(tmp_path / "a.tiles", record)
    with pytest.raises(ValueError, match="kind must be 'host' or 'pool', got 'tiles'"):
        read_like(tmp_path / "a.tiles", record, kind="tiles")
    with pytest.raises(ValueError, match="capacity must be at least 0, got -1"):
        read_like(tmp_path / "a.tiles", record, capacity=-1)
    with pytest.raises(TypeError, match="capacity must be an int, got float"):
        read_like(tmp_path / "a.tiles", record, capacity=3.0)
    with pytest.raises(ValueError, match="max_names must be at least 0, got -1"):
        read_like(tmp_path / "a.tiles", record, max_names=-1)
    with pytest.raises(TypeError, match="max_names must be an int, got float"):
        read_like(tmp_path / "a.tiles", record, max_names=3.0)


def strided(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


BAD_RECORDS = {
    "kind": (lambda r: {"kind": "disk"}, ValueError, "kind of a tile record must be 'host' or 'pool', got 'disk'"),
    "names dtype": (lambda r: {"names": r.names.int()}, TypeError, "names must have dtype int64, got int32"),
    "names shape": (lambda r: {"names": r.names[:, :3]}, ValueError, r"names must have shape \[m, 4\], got \[5, 3\]"),
    "named shape": (lambda r: {"named": r.named[1:]}, ValueError, r"m = 5 \(set by names\), got \[4\]"),
    "named dtype": (lambda r: {"named": r.named.int()}, TypeError, "named must have dtype int64, got int32"),
    "no tiles": (lambda r: {"tiles": ()}, ValueError, "tiles of a record must be 1 tensors, got 0"),
    "too many": (lambda r: {"tiles": r.tiles * 2}, ValueError, "tiles of a record must be 1 tensors, got 2"),
    "dtype": (lambda r: {"tiles": (r.tiles[0].half(),)}, TypeError, r"tiles\[0\] must have dtype float32, got float16"),
    "shape": (lambda r: {"tiles": (r.tiles[0][:, 1:],)}, ValueError, r"shape \[3, 4, 5\], got \[3, 3, 5\]"),
    "a number": (lambda r: {"tiles": (torch.tensor(1.0),)}, ValueError, r"shape \[1, 4, 5\], got \[\]"),
    "strided": (lambda r: {"tiles": (strided(r.tiles[0]),)}, ValueError, r"contiguous and on the CPU, got strides"),
    "strided names": (lambda r: {"names": strided(r.names)}, ValueError, r"contiguous and on the CPU, got strides"),
    "device": (lambda r: {"tiles": (r.tiles[0].to("meta"),)}, ValueError, "on the CPU, got strides .* on meta"),
    "unnamed": (lambda r: {"named": r.named * 0}, ValueError, "every stored tile must be named, got none for tile 1"),
    "twice": (lambda r: {"names": r.names.clamp(max=1)}, ValueError, "names must be distinct, got sequence 1, head 1"),
}


@pytest.mark.parametrize("change, error, words", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_record_that_breaks_its_rules_is_not_written(tmp_path, change, error, words):
    record = make_record()
    with pytest.raises(error, match=words):
        write_tile_file(tmp_path / "a.tiles", replace(record, **change(record)))
    assert os.listdir(tmp_path) == []
