"""Tile files that are damaged, cut, mixed up or forged: each is refused in words, and nothing is allocated for it.

Offsets and checksums are written out here, as docs/tile_format.md gives them, not taken from the code under test.
"""

import contextlib
import itertools
import os
import struct
import tracemalloc
import zlib

import pytest
import torch

from pagedkv import CorruptPageError
from pagedkv.storage.tiles import TileGeometry, tile_file
from pagedkv.storage.tiles.tile_file import read_tile_file, write_tile_file
from pagedkv.storage.tiles.tile_record import HOST, POOL, TileRecord

GEOMETRY = TileGeometry(2, 3, 3, torch.float32)
TILE_BYTES = 2 * 3 * 4
NAMES = [[1, 0, 0, 0], [1, 0, 0, 1], [2, 0, 0, 0]]
NAMED = [0, 1, 0]
U32 = {"mark": 8, "version": 12, "kind": 16, "dtype": 20, "index_checksum": 96}
U64_NAMES = ["tile_size", "head_dim", "value_dim", "num_names", "num_stored"]
U64_NAMES += ["index_offset", "index_bytes", "tiles_offset", "tiles_bytes"]
U64 = {name: 24 + 8 * i for i, name in enumerate(U64_NAMES)}


def sample(kind=HOST, dtype=torch.float32):
    geometry = TileGeometry(2, 3, 3 if kind == HOST else 1, dtype)
    names = torch.tensor(NAMES)
    if kind == POOL:
        names[1, 2], names[:, 3] = 1, 2
    shapes = [(2, 2, 3)] if kind == HOST else [(2, 2, 3), (2, 2, 1)]
    tiles = [torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).to(dtype) for shape in shapes]
    tiles += [torch.rand(2, 2) for _ in shapes if dtype == torch.int8]
    return TileRecord(kind, geometry, names, torch.tensor(NAMED), tuple(tiles))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.tiles"


def written(path, record):
    write_tile_file(path, record)
    return path.read_bytes()


def read(path, raw, **changes):
    path.write_bytes(raw)
    return read_tile_file(path, **{"kind": HOST, "geometry": GEOMETRY, "capacity": 2, **changes})


@contextlib.contextmanager
def flipped(path, position, mask):
    """Meanwhile one byte of the file is another, in place: thousands of whole files would wait for the disk."""
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, position)
        os.pwrite(file.fileno(), bytes([byte[0] ^ mask]), position)
        yield
        os.pwrite(file.fileno(), byte, position)


def signed(raw, **fields):
    """The bytes with other header fields and a checksum that agrees with them."""
    raw = bytearray(raw)
    for name, value in fields.items():
        if name in U32:
            struct.pack_into("<I", raw, U32[name], value)
        else:
            struct.pack_into("<Q", raw, U64[name], value)
    struct.pack_into("<I", raw, 124, zlib.crc32(raw[:124]))
    return bytes(raw)


def forged(names=NAMES, named=NAMED, tiles=None, order=None, **fields):
    """A file whose header and index are signed, of any names and tiles; `order`: which tile's checksum stands where."""
    tiles = [bytes([i + 1]) * TILE_BYTES for i in range(2)] if tiles is None else tiles
    checksums = [zlib.crc32(struct.pack("<Q", i) + tile) for i, tile in enumerate(tiles)]
    checksums = [checksums[i] for i in order or range(len(tiles))]
    index = b"".join(struct.pack("<4q", *row) for row in names) + struct.pack(f"<{len(named)}q", *named)
    index += struct.pack(f"<{len(checksums)}I", *checksums)
    sizes = {"tile_size": 2, "head_dim": 3, "value_dim": 3, "num_names": len(names), "num_stored": len(tiles)}
    sections = {"index_offset": 128, "index_bytes": len(index), "tiles_offset": 128 + len(index)}
    known = {"mark": 0x01020304, "version": 1, "kind": 1, "dtype": 1, **sizes, **sections}
    known |= {"tiles_bytes": TILE_BYTES * len(tiles), "index_checksum": zlib.crc32(index)}
    return signed(b"\x89PKV\r\n\x1a\n" + bytes(120) + index + b"".join(tiles), **{**known, **fields})


def fits(record):
    return {"kind": record.kind, "geometry": record.geometry, "capacity": 2}


SAMPLES = [(HOST, torch.float32), (HOST, torch.int8), (POOL, torch.bfloat16), (POOL, torch.int8)]


@pytest.mark.parametrize("kind, dtype", SAMPLES, ids=str)
def test_every_bit_of_every_byte_is_guarded(path, kind, dtype):
    record = sample(kind, dtype)
    raw = written(path, record)
    for position, mask in itertools.product(range(len(raw)), [*(1 << bit for bit in range(8)), 0xFF]):
        words = "a.tiles .*is corrupt: .* expected, .* found"
        with flipped(path, position, mask), pytest.raises(CorruptPageError, match=words):
            read_tile_file(path, **fits(record))
    read_tile_file(path, **fits(record))


def test_every_value_of_header_bytes_is_guarded(path):
    record = sample()
    written(path, record)
    positions = [0, 4, 8, 11, 12, 16, 20, 24, 48, 56, 64, 96, 100, 124, 127]
    for position, mask in itertools.product(positions, range(1, 256)):
        with flipped(path, position, mask), pytest.raises(CorruptPageError, match="magic|header checksum"):
            read_tile_file(path, **fits(record))


@pytest.mark.parametrize("kind, dtype", SAMPLES, ids=str)
def test_cut_after_every_byte(path, kind, dtype):
    record = sample(kind, dtype)
    raw = written(path, record)
    for num_bytes in reversed(range(len(raw))):
        os.truncate(path, num_bytes)
        words = "header of 128 bytes" if num_bytes < 128 else f"file of {len(raw)} bytes"
        with pytest.raises(CorruptPageError, match=f"{words} expected, {num_bytes} found"):
            read_tile_file(path, **fits(record))


@pytest.mark.parametrize("off_by", [-1, 0, 1])
def test_cut_at_every_boundary_of_a_larger_file(path, off_by):
    names = torch.tensor([[i, 0, 0, 2] for i in range(9)])
    geometry = TileGeometry(16, 8, 4, torch.int8)
    tiles = [torch.ones(9, 16, dim, dtype=torch.int8) for dim in (8, 4)] + [torch.ones(9, 16)] * 2
    raw = written(path, TileRecord(POOL, geometry, names, torch.arange(9), tuple(tiles)))
    lengths = [8, 120, 9 * 32, 9 * 8, 9 * 4, 9 * 128, 9 * 64, 9 * 64, 9 * 64]
    boundaries = list(itertools.accumulate(lengths))
    assert boundaries[-1] == len(raw)
    assert read(path, raw, kind=POOL, geometry=geometry, capacity=9).named.tolist() == list(range(9))
    for boundary in boundaries[: len(boundaries) - (off_by >= 0)]:
        with pytest.raises(CorruptPageError, match=f"bytes expected, {boundary + off_by} found"):
            read(path, raw[: boundary + off_by], kind=POOL, geometry=geometry, capacity=9)


@pytest.mark.parametrize("surplus", [b"\0", b"\n", bytes(128)])
def test_surplus_bytes(path, surplus):
    raw = written(path, sample())
    words = f"file of {len(raw)} bytes expected, {len(raw) + len(surplus)} found"
    with pytest.raises(CorruptPageError, match=words):
        read(path, raw + surplus)
    with pytest.raises(CorruptPageError, match=words):
        read(path, raw[:128] + surplus + raw[128:])


@pytest.mark.parametrize("raw", [b"", b"\x89", b"PK\x03\x04" + bytes(200), bytes(304), b"\xff" * 304, b"text\n" * 60])
def test_what_is_no_tile_file(path, raw):
    with pytest.raises(CorruptPageError, match="magic 89 50 4b 56 0d 0a 1a 0a expected|header of 128 bytes expected"):
        read(path, raw)


@pytest.mark.parametrize("transfer", [lambda raw: raw.replace(b"\r\n", b"\n"), lambda raw: bytes(b & 127 for b in raw)])
def test_transfer_as_text_breaks_the_magic(path, transfer):
    with pytest.raises(CorruptPageError, match="magic"):
        read(path, transfer(written(path, sample())))


def test_damaged_tile_is_named(path):
    raw = bytearray(written(path, sample()))
    raw[-1] ^= 1
    words = (
        r"stored tile 1 of tile file .*a.tiles \(sequence 1, head 0, tile 0, part v\) is corrupt: checksum 0x\w{8} exp"
    )
    with pytest.raises(CorruptPageError, match=words + r"ected, 0x\w{8} found.$"):
        read(path, raw)
    raw[-1 - TILE_BYTES] ^= 1
    with pytest.raises(CorruptPageError, match=r"stored tile 0 .*part k\) .* It is the first of 2"):
        read(path, raw)


@pytest.mark.parametrize("kind, dtype", SAMPLES, ids=str)
def test_scales_are_part_of_their_tile(path, kind, dtype):
    record = sample(kind, dtype)
    raw = written(path, record)
    for position in range(len(raw) - sum(t.nbytes for t in record.tiles), len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        from_the_end, ends = len(raw) - position, list(itertools.accumulate(t.nbytes for t in reversed(record.tiles)))
        part = next(i for i, end in enumerate(ends) if from_the_end <= end)
        num_bytes = record.tiles[len(ends) - 1 - part].nbytes
        tile = int(ends[part] - from_the_end >= num_bytes // 2)
        with pytest.raises(CorruptPageError, match=f"stored tile {tile} of"):
            read(path, damaged, **fits(record))


def test_swapped_tiles(path):
    raw = written(path, sample())
    index, first, second = raw[:-48], raw[-48:-24], raw[-24:]
    with pytest.raises(CorruptPageError, match="stored tile 0 .* It is the first of 2"):
        read(path, index + second + first)
    checksums = index[-8:]
    with pytest.raises(CorruptPageError, match="index checksum"):
        read(path, index[:-8] + checksums[4:] + checksums[:4] + second + first)


def test_tiles_swapped_together_with_their_checksums_in_a_signed_index(path):
    first, second = b"a" * TILE_BYTES, b"b" * TILE_BYTES
    read(path, forged(tiles=[first, second]))
    away = [zlib.crc32(struct.pack("<Q", i) + tile) for i, tile in enumerate([first, second])]
    raw = forged(tiles=[second, first])
    index = raw[128:-56] + struct.pack("<2I", away[1], away[0])
    raw = signed(raw[:128] + index + raw[-48:], index_checksum=zlib.crc32(index))
    with pytest.raises(CorruptPageError, match="stored tile 0 .* It is the first of 2"):
        read(path, raw)


def test_equal_tiles_do_not_stand_for_each_other(path):
    with pytest.raises(CorruptPageError, match="stored tile 0 .* It is the first of 2"):
        read(path, forged(tiles=[b"a" * TILE_BYTES] * 2, order=[1, 0]))


def test_swapped_names(path):
    raw = written(path, sample())
    swapped = raw[:128] + raw[160:192] + raw[128:160] + raw[192:]
    assert swapped != raw
    with pytest.raises(CorruptPageError, match=r"index checksum 0x\w{8} expected, 0x\w{8} found"):
        read(path, swapped)


def test_sections_of_two_sound_files_do_not_mix(path):
    one = written(path, sample())
    record = sample()
    record.tiles[0].neg_()
    other = written(path, record)
    cuts = [0, 128, 128 + 3 * 40 + 8, len(one)]
    pieces = [(one[a:b], other[a:b]) for a, b in itertools.pairwise(cuts)]
    for choice in itertools.product((0, 1), repeat=3):
        mixed = b"".join(piece[i] for piece, i in zip(pieces, choice, strict=True))
        if len(set(choice)) == 1:
            read(path, mixed)
            continue
        with pytest.raises(CorruptPageError, match="index checksum|stored tile 0"):
            read(path, mixed)


HUGE = [2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]


@pytest.mark.parametrize("name", [*U64, "several"])
@pytest.mark.parametrize("huge", HUGE)
def test_huge_and_negative_counts_allocate_nothing(path, monkeypatch, name, huge):
    raw = forged()
    fields = dict.fromkeys(U64_NAMES[:5], huge) if name == "several" else {name: huge}
    tracemalloc.start()
    monkeypatch.setattr(tile_file, "_read_array", None)
    try:
        error = ValueError if name == "value_dim" else CorruptPageError  # no payload of this kind depends on value_dim
        with pytest.raises(error, match="must be 3 like that of the cache|expected, .* found"):
            read(path, signed(raw, **fields))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["tile_size", "head_dim", "num_names", "num_stored"])
@pytest.mark.parametrize("huge", HUGE)
def test_huge_counts_with_lengths_that_agree_modulo_2_to_the_64(path, monkeypatch, name, huge):
    """Products that wrap would come back to the file's size; here they do not wrap."""
    sizes = {"tile_size": 2, "head_dim": 3, "num_names": 3, "num_stored": 2, name: huge}
    index_bytes = 40 * sizes["num_names"] + 4 * sizes["num_stored"]
    tiles_bytes = sizes["num_stored"] * sizes["tile_size"] * sizes["head_dim"] * 4
    sections = {"index_bytes": index_bytes, "tiles_offset": 128 + index_bytes, "tiles_bytes": tiles_bytes}
    monkeypatch.setattr(tile_file, "_read_array", None)
    with pytest.raises(CorruptPageError, match="expected, .* found"):
        read(path, signed(forged(), **{name: huge}, **{key: value % 2**64 for key, value in sections.items()}))


@pytest.mark.parametrize("kind", [HOST, POOL])
def test_names_that_a_sparse_file_only_claims_are_allocated_by_no_one(path, kind):
    """The length is right and costs nothing on the disk; the index is zeros, whose checksum is not the header's."""
    record, num_names = sample(kind), 2_000_000
    index_bytes = 40 * num_names + 4
    tiles_bytes = sum(tensor.nbytes for tensor in record.tiles) // 2
    counts = {"num_names": num_names, "num_stored": 1, "index_bytes": index_bytes}
    sections = {"tiles_offset": 128 + index_bytes, "tiles_bytes": tiles_bytes}
    path.write_bytes(signed(written(path, record)[:128], **counts, **sections))
    os.truncate(path, 128 + index_bytes + tiles_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptPageError, match=r"index checksum 0x\w{8} expected, 0x\w{8} found"):
            read_tile_file(path, **fits(record))
        with pytest.raises(ValueError, match="names of tile file .*a.tiles must be at most 12, .* got 2000000"):
            read_tile_file(path, **fits(record), max_names=12)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_bound_on_names_is_checked_before_the_index_is_read(path, monkeypatch):
    written(path, sample())
    monkeypatch.setattr(tile_file, "_check_index", None)
    with pytest.raises(ValueError, match="must be at most 2, .* got 3"):
        read_tile_file(path, **fits(sample()), max_names=2)


@pytest.mark.parametrize("off_by", [-1, 0, 1])
def test_index_of_about_a_whole_chunk(path, monkeypatch, off_by):
    raw = written(path, sample())
    index_bytes = 3 * 40 + 2 * 4
    monkeypatch.setattr(tile_file, "_CHUNK_BYTES", index_bytes // 2 + off_by)
    assert read(path, raw).named.tolist() == NAMED
    for position in range(128, 128 + index_bytes):
        with flipped(path, position, 1), pytest.raises(CorruptPageError, match="index checksum"):
            read_tile_file(path, **fits(sample()))


def test_index_that_changes_after_its_checksum_held(path, monkeypatch):
    written(path, sample())
    check = tile_file._check_index

    def check_then_change(*args):
        check(*args)
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), b"\x05", 128)

    monkeypatch.setattr(tile_file, "_check_index", check_then_change)
    with pytest.raises(CorruptPageError, match="index checksum"):
        read_tile_file(path, **fits(sample()))


@pytest.mark.parametrize("section", U64_NAMES[5:])
def test_sections_elsewhere(path, section):
    found = struct.unpack_from("<Q", forged(), U64[section])[0]
    for value in (0, found - 1, found + 1):
        with pytest.raises(
            CorruptPageError, match=r"offsets and lengths of the sections \(128, 128, 256, 48\) expected"
        ):
            read(path, signed(forged(), **{section: value}))


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"version": 2}, ValueError, "version of tile file .*a.tiles must be 1, got 2"),
        ({"version": 0}, ValueError, "version of tile file .*a.tiles must be 1, got 0"),
        ({"kind": 0}, CorruptPageError, r"codes of kind and dtype 1 to 2 and 1 to 4 expected, \(0, 1\) found"),
        ({"kind": 3}, CorruptPageError, r"codes of kind and dtype .* \(3, 1\) found"),
        ({"dtype": 0}, CorruptPageError, r"codes of kind and dtype .* \(1, 0\) found"),
        ({"dtype": 5}, CorruptPageError, r"codes of kind and dtype .* \(1, 5\) found"),
        ({"mark": 0x01020305}, CorruptPageError, "byte-order mark 0x1020304 expected, 0x1020305 found"),
    ],
    ids=str,
)
def test_signed_header_that_this_version_does_not_know(path, fields, error, words):
    with pytest.raises(error, match=words):
        read(path, signed(forged(), **fields))


def test_newer_version_is_told_from_damage_whatever_follows_its_header(path):
    newer = signed(forged(), version=7, kind=9, tile_size=2**60)
    with pytest.raises(ValueError, match="must be 1, got 7"):
        read(path, newer + b"more")
    with pytest.raises(CorruptPageError, match="header checksum"):
        read(path, newer[:127] + bytes([newer[127] ^ 1]) + newer[128:])


def test_file_of_the_other_byte_order(path):
    fields = struct.pack(">4I9QI24x", 0x01020304, 1, 1, 1, 2, 3, 3, 0, 0, 128, 0, 128, 0, 0)
    header = b"\x89PKV\r\n\x1a\n" + fields
    header += struct.pack(">I", zlib.crc32(header))
    with pytest.raises(ValueError, match="byte order of tile file .*a.tiles must be little, got big"):
        read(path, header)
    with pytest.raises(CorruptPageError, match="header checksum"):
        read(path, header[:40] + b"\x55" + header[41:])


def test_reserved_bytes_are_zero(path):
    raw = bytearray(forged())
    raw[110] = 1
    with pytest.raises(CorruptPageError, match="reserved bytes zero expected, 00 .* 01 .* found"):
        read(path, signed(raw))


@pytest.mark.parametrize(
    "record, changes, words",
    [
        (sample(), {"kind": POOL}, "kind of tile file .*a.tiles must be pool like that of the cache, got host"),
        (sample(POOL), {"geometry": TileGeometry(2, 3, 1, torch.float32)}, "kind .* must be host .*, got pool"),
        (sample(dtype=torch.float16), {}, "dtype of tile file .*a.tiles must be float32 .*, got float16"),
        (
            sample(dtype=torch.float16),
            {"geometry": TileGeometry(2, 3, 3, torch.bfloat16)},
            "be bfloat16 .*, got float16",
        ),
        (sample(dtype=torch.int8), {}, "dtype .* must be float32 like that of the cache, got int8"),
        (sample(), {"geometry": TileGeometry(3, 2, 2, torch.float32)}, "tile_size .* must be 3 .*, got 2"),
        (sample(), {"geometry": TileGeometry(2, 6, 6, torch.float32)}, "head_dim .* must be 6 .*, got 3"),
        (sample(), {"geometry": TileGeometry(2, 3, 4, torch.float32)}, "value_dim .* must be 4 .*, got 3"),
        (sample(), {"capacity": 1}, "stored tiles of .*a.tiles must be at most the capacity 1, got 2"),
        (sample(), {"capacity": 0}, "at most the capacity 0, got 2"),
    ],
    ids=lambda value: "" if isinstance(value, TileRecord) else str(value),
)
def test_sound_file_that_does_not_fit(path, record, changes, words):
    raw = written(path, record)
    with pytest.raises(ValueError, match=words):
        read(path, raw, **changes)
    with pytest.raises(CorruptPageError, match="bytes expected"):
        read(path, raw[:-1], **changes)


@pytest.mark.parametrize(
    "names, named, words",
    [
        ([[-1, 0, 0, 0], *NAMES[1:]], NAMED, "sequence of name 0 must be from 0 to 2147483647, got -1"),
        ([[1, 2**31, 0, 0], *NAMES[1:]], NAMED, "head of name 0 must be from 0 to 2147483647, got 2147483648"),
        ([*NAMES[:2], [1, 0, -(2**63), 0]], NAMED, "tile of name 2 must be from 0 to .*, got -9223372036854775808"),
        ([*NAMES[:2], [2, 0, 0, 2]], NAMED, "part of name 2 must be 0 or 1 in a file of kind host, got 2"),
        ([*NAMES[:2], [2, 0, 0, -1]], NAMED, "part of name 2 must be 0 or 1 in a file of kind host, got -1"),
        (NAMES, [0, 2, 0], "name 1 must name one of 2 stored tiles, got 2"),
        (NAMES, [0, 1, -1], "name 2 must name one of 2 stored tiles, got -1"),
        (NAMES, [0, 1, -(2**63)], "name 2 must name one of 2 stored tiles, got -9223372036854775808"),
        ([NAMES[0], NAMES[1], NAMES[0]], NAMED, "names must be distinct, got sequence 1, head 0, tile 0, part k twice"),
        (NAMES[::2], [0, 0], "every stored tile must be named, got none for tile 1"),
        (NAMES[:1], [0], "every stored tile must be named, got 1 names of 2"),
        ([], [], "every stored tile must be named, got 0 names of 2"),
        (
            [*NAMES[:2], [2, 1, 0, 0]],
            NAMED,
            "names of one stored tile must differ in the sequence alone, got .* and .*",
        ),
        (
            [*NAMES[:2], [2, 0, 0, 1]],
            NAMED,
            "must differ in the sequence alone, got sequence .*, part . and sequence .*",
        ),
    ],
    ids=str,
)
def test_signed_names_that_break_their_rules(path, names, named, words):
    with pytest.raises(CorruptPageError, match=f"tile file .*a.tiles is corrupt: .*{words}"):
        read(path, forged(names, named))


def test_parts_of_a_pool_are_both(path):
    record = sample(POOL)
    raw = bytearray(written(path, record))
    for part in (0, 1, 3):
        raw[128 + 24] = part
        index = bytes(raw[128 : 128 + 3 * 40 + 8])
        with pytest.raises(CorruptPageError, match=f"part of name 0 must be 2 in a file of kind pool, got {part}"):
            read(path, signed(raw, index_checksum=zlib.crc32(index)), **fits(record))


def test_largest_indices_are_sound(path):
    largest = 2**31 - 1
    record = read(path, forged([[largest, largest, largest, 1], [largest, largest, largest, 0]], [1, 0]))
    assert record.names.tolist() == [[largest, largest, largest, 1], [largest, largest, largest, 0]]
    assert record.named.tolist() == [1, 0]


def test_names_without_stored_tiles_and_nothing_at_all(path):
    with pytest.raises(CorruptPageError, match="name 0 must name one of 0 stored tiles, got 0"):
        read(path, forged(NAMES, NAMED, tiles=[]))
    empty = read(path, forged([], [], tiles=[]), capacity=0)
    assert (empty.names.shape, empty.named.shape, empty.tiles[0].shape) == ((0, 4), (0,), (0, 2, 3))


def test_file_that_shrinks_while_it_is_read(path, monkeypatch):
    written(path, sample())
    raw = path.read_bytes()
    status = os.stat(path)
    monkeypatch.setattr(tile_file.os, "fstat", lambda file: status)
    for num_bytes in (128, 200, len(raw) - 1):
        with pytest.raises(CorruptPageError, match="section of .* bytes expected, .* found"):
            read(path, raw[:num_bytes])
