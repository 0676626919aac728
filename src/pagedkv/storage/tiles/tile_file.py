"""Tile files: the content of a tile cache as one checked file. docs/tile_format.md has every byte."""

from __future__ import annotations

import errno
import io
import os
import stat
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import CorruptPageError
from ...shapes import Shapes, check_choice, check_dtype, check_int
from .tile_file_header import HEADER_BYTES, TileFileHeader, corrupt
from .tile_file_names import name_text, names_defect
from .tile_file_replace import replace_file
from .tile_geometry import TileGeometry
from .tile_record import HOST, POOL, TileRecord

__all__ = ["read_tile_file", "write_tile_file"]

FilePath = str | bytes | os.PathLike[str]
Array = npt.NDArray[Any]

# Moves keep every bit, so numbers pass through numpy as integers of their size: it has no bfloat16.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# How much of the index is in memory at once before it is known to be sound.
_CHUNK_BYTES = 1 << 20


def write_tile_file(path: FilePath, record: TileRecord) -> None:
    """Writes the record as the file at `path`, in the place of what is there.

    Owns:   the file is written under another name in the same folder, synced, renamed: it is there whole or not at all.
            The tensors are read where they lie and must not change meanwhile.
    Raises: ValueError, TypeError for a record that does not keep its own rules; OSError, a FileNotFoundError where the
            folder is not there. Whatever stops it, the old file is unchanged.
    """
    header = _checked_header(record)
    arrays = [_array(tensor) for tensor in record.tiles]
    checksums = _tile_checksums(arrays, header.num_stored)
    index = [_buffer(array) for array in (_array(record.names), _array(record.named), checksums)]
    header = TileFileHeader(**{**vars(header), "index_checksum": _checksum(index)})
    replace_file(path, [memoryview(header.pack()), *index, *map(_buffer, arrays)])


def read_tile_file(
    path: FilePath, *, kind: str, geometry: TileGeometry, capacity: int, max_names: int | None = None
) -> TileRecord:
    """Reads the file at `path` for a cache of this kind and geometry that holds `capacity` stored tiles (POOL: pages).

    max_names: the most names the cache has places for (POOL: beams * heads * tiles); None is no bound.
    Owns:   the record's tensors are new. Nothing is allocated before the file's size is what its header says, nor for
            the index before its checksum holds. Who forges both can ask for as much as the file is long.
    Raises: CorruptPageError for any damaged, missing or surplus byte; ValueError for a sound file that does not fit: of
            another version, byte order, kind, dtype or geometry, of more tiles than the capacity or more names than
            max_names; OSError for what is no readable file, such as a folder or a FIFO.
    """
    check_choice("kind", kind, (HOST, POOL))
    check_int("capacity", capacity, minimum=0)
    if max_names is not None:
        check_int("max_names", max_names, minimum=0)
    name = os.fsdecode(path)
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        raw = bytearray(min(HEADER_BYTES, status.st_size))
        _read(file, memoryview(raw), name)
        header = TileFileHeader.unpack(bytes(raw), name)
        if status.st_size != header.file_bytes:
            raise corrupt(name, "file of", f"{header.file_bytes} bytes", status.st_size)
        header.check_fits(name, kind, geometry, capacity, max_names)
        names, named, checksums = _read_index(file, header, name)
        arrays = [_read_array(file, dtype.itemsize, shape, name) for dtype, shape in header.stored()]
    _check_tiles(arrays, checksums, names, named, name)
    tiles = tuple(_tensor(a, dtype) for a, (dtype, _) in zip(arrays, header.stored(), strict=True))
    return TileRecord(kind, geometry, _tensor(names, torch.int64), _tensor(named, torch.int64), tiles)


def _checked_header(record: TileRecord) -> TileFileHeader:
    """The header of the record, without its checksum; refuses a record that could not be read again."""
    check_choice("kind of a tile record", record.kind, (HOST, POOL))
    shapes = Shapes()
    for name, tensor, pattern in (("names", record.names, "m 4"), ("named", record.named, "m")):
        check_dtype(name, tensor, torch.int64)
        shapes.check(name, tensor, pattern)
    geometry = record.geometry
    dims = (geometry.tile_size, geometry.head_dim, geometry.value_dim)
    num_stored = record.tiles[0].shape[:1].numel() if record.tiles else 0
    header = TileFileHeader(record.kind, geometry.dtype, *dims, len(record.named), num_stored, 0)
    if len(record.tiles) != len(header.stored()):
        raise ValueError(f"tiles of a record must be {len(header.stored())} tensors, got {len(record.tiles)}.")
    for i, (tensor, (dtype, shape)) in enumerate(zip(record.tiles, header.stored(), strict=True)):
        check_dtype(f"tiles[{i}]", tensor, dtype)
        shapes.check(f"tiles[{i}]", tensor, " ".join(map(str, shape)))
    for tensor in (record.names, record.named, *record.tiles):
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            got = f"strides {list(tensor.stride())} on {tensor.device}"
            raise ValueError(f"tensors of a record must be contiguous and on the CPU, got {got}.")
    defect = names_defect(record.kind, record.names.numpy(), record.named.numpy(), header.num_stored)
    if defect:
        raise ValueError(f"{defect}.")
    return header


def _array(tensor: torch.Tensor) -> Array:
    """The bits of the tensor as little-endian integers: on a little-endian machine without a copy."""
    array = tensor.detach().view(_INTEGERS[tensor.dtype.itemsize]).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    if not array.size:
        # Strides of an empty numpy array are 0, and torch refuses views of such.
        return torch.empty(array.shape, dtype=dtype, device="cpu")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False)).view(dtype)


def _buffer(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _checksum(buffers: Sequence[memoryview]) -> int:
    value = 0
    for buffer in buffers:
        value = zlib.crc32(buffer, value)
    return value


def _tile_checksums(arrays: Sequence[Array], num_stored: int) -> npt.NDArray[np.uint32]:
    """One a stored tile, of its index and then all its bytes: equal tiles in other places have other checksums."""
    parts = [(_buffer(array), array.nbytes // max(num_stored, 1)) for array in arrays]
    checksums = np.empty(num_stored, dtype="<u4")
    for tile in range(num_stored):
        value = zlib.crc32(tile.to_bytes(8, "little"))
        for buffer, num_bytes in parts:
            value = zlib.crc32(buffer[tile * num_bytes : (tile + 1) * num_bytes], value)
        checksums[tile] = value
    return checksums


def _open_at_once(path: str, flags: int) -> int:
    # A FIFO would otherwise wait here for someone to write to it.
    return os.open(path, flags | os.O_NONBLOCK)


def _read(file: io.FileIO, buffer: memoryview, path: str) -> None:
    expected = len(buffer)
    while len(buffer):
        num_bytes = file.readinto(buffer)
        if not num_bytes:
            raise corrupt(path, "section of", f"{expected} bytes", expected - len(buffer))
        buffer = buffer[num_bytes:]


def _read_array(file: io.FileIO, itemsize: int, shape: tuple[int, ...], path: str) -> Array:
    array: Array = np.empty(shape, dtype=f"<i{itemsize}")
    _read(file, _buffer(array), path)
    return array


def _read_index(file: io.FileIO, header: TileFileHeader, path: str) -> tuple[Array, Array, Array]:
    _check_index(file, header, path)
    names = _read_array(file, 8, (header.num_names, 4), path)
    named = _read_array(file, 8, (header.num_names,), path)
    checksums = _read_array(file, 4, (header.num_stored,), path).view("<u4")
    # Once more: the file may have changed since.
    _compare_index(header, _checksum([_buffer(array) for array in (names, named, checksums)]), path)
    defect = names_defect(header.kind, names, named, header.num_stored)
    if defect:
        raise CorruptPageError(f"tile file {path} is corrupt: {defect}.")
    return names, named, checksums


def _check_index(file: io.FileIO, header: TileFileHeader, path: str) -> None:
    """Reads the index and goes back to its beginning; a length that is not true costs no memory."""
    actual, left = 0, header.index_bytes
    chunk = memoryview(bytearray(min(left, _CHUNK_BYTES)))
    while left:
        chunk = chunk[:left]
        _read(file, chunk, path)
        actual = zlib.crc32(chunk, actual)
        left -= len(chunk)
    _compare_index(header, actual, path)
    file.seek(HEADER_BYTES)


def _compare_index(header: TileFileHeader, actual: int, path: str) -> None:
    if actual != header.index_checksum:
        raise corrupt(path, "index checksum", f"{header.index_checksum:#010x}", f"{actual:#010x}")


def _check_tiles(arrays: Sequence[Array], checksums: Array, names: Array, named: Array, path: str) -> None:
    actual = _tile_checksums(arrays, len(checksums))
    damaged = np.flatnonzero(actual != checksums)
    if not len(damaged):
        return
    tile = int(damaged[0])
    which = name_text(names[np.flatnonzero(named == tile)[0]])
    others = f" It is the first of {len(damaged)}." if len(damaged) > 1 else ""
    raise CorruptPageError(
        f"stored tile {tile} of tile file {path} ({which}) is corrupt: "
        f"checksum {checksums[tile]:#010x} expected, {actual[tile]:#010x} found.{others}"
    )
