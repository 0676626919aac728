"""The first 128 bytes of a tile file: what it holds, and where. docs/tile_format.md has every byte."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

import torch

from ...errors import CorruptPageError
from ...shapes import dtype_name
from .tile_geometry import TileGeometry
from .tile_record import HOST, POOL

__all__ = ["HEADER_BYTES", "TILE_FILE_VERSION", "TileFileHeader", "corrupt"]

HEADER_BYTES = 128
TILE_FILE_VERSION = 1

# The high bit, both line ends, the end-of-file byte of DOS: each falls to some transfer that takes bytes for text.
_MAGIC = b"\x89PKV\r\n\x1a\n"
_BYTE_ORDER_MARK = 0x01020304
_FIELDS = struct.Struct("<8s4I9QI24x")
_KINDS = {1: HOST, 2: POOL}
_DTYPES = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16, 4: torch.int8}


def corrupt(path: str, what: str, expected: object, found: object) -> CorruptPageError:
    """The error of a file whose bytes are not those that were saved."""
    return CorruptPageError(f"tile file {path} is corrupt: {what} {expected} expected, {found} found.")


@dataclass(frozen=True)
class TileFileHeader:
    """What the header says; the offsets and lengths in it follow from the counts and are checked against them.

    The three sizes are plain integers: of a file read they are whatever it says, up to 2^64 - 1.
    """

    kind: str
    dtype: torch.dtype
    tile_size: int
    head_dim: int
    value_dim: int
    num_names: int
    num_stored: int
    index_checksum: int

    @property
    def index_bytes(self) -> int:
        """Names (four int64 and one that says which tile), then one checksum a stored tile."""
        return 40 * self.num_names + 4 * self.num_stored

    @property
    def tiles_bytes(self) -> int:
        """The stored tiles and their scales."""
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in self.stored()]
        return sum(sizes)

    @property
    def file_bytes(self) -> int:
        """The whole file."""
        return HEADER_BYTES + self.index_bytes + self.tiles_bytes

    def stored(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of each tensor of `TileRecord.tiles`, in order."""
        rows = (self.num_stored, self.tile_size)
        dims = [self.head_dim] if self.kind == HOST else [self.head_dim, self.value_dim]
        tiles: list[tuple[torch.dtype, tuple[int, ...]]] = [(self.dtype, (*rows, dim)) for dim in dims]
        return tiles + [(torch.float32, rows) for _ in dims if self.dtype == torch.int8]

    def pack(self) -> bytes:
        """The 128 bytes."""
        fields = _FIELDS.pack(
            _MAGIC,
            _BYTE_ORDER_MARK,
            TILE_FILE_VERSION,
            next(code for code, kind in _KINDS.items() if kind == self.kind),
            next(code for code, dtype in _DTYPES.items() if dtype == self.dtype),
            *(self.tile_size, self.head_dim, self.value_dim, self.num_names, self.num_stored),
            *self._sections(),
            self.index_checksum,
        )
        return fields + zlib.crc32(fields).to_bytes(4, "little")

    @classmethod
    def unpack(cls, raw: bytes, path: str) -> TileFileHeader:
        """Reads what `pack` wrote.

        Raises: CorruptPageError for bytes that no tile file begins with; ValueError for another byte order or version.
        """
        _check_sound(raw, path)
        _, mark, version, kind, dtype, *sizes_and_sections, checksum = _FIELDS.unpack(raw[:-4])
        if mark != _BYTE_ORDER_MARK:
            raise corrupt(path, "byte-order mark", hex(_BYTE_ORDER_MARK), hex(mark))
        if version != TILE_FILE_VERSION:
            raise ValueError(f"version of tile file {path} must be {TILE_FILE_VERSION}, got {version}.")
        if kind not in _KINDS or dtype not in _DTYPES:
            raise corrupt(path, "codes of kind and dtype", f"1 to {len(_KINDS)} and 1 to {len(_DTYPES)}", (kind, dtype))
        tile_size, head_dim, value_dim, num_names, num_stored, *sections = sizes_and_sections
        dims = (tile_size, head_dim, value_dim)
        header = cls(_KINDS[kind], _DTYPES[dtype], *dims, num_names, num_stored, checksum)
        if tuple(sections) != header._sections():
            raise corrupt(path, "offsets and lengths of the sections", header._sections(), tuple(sections))
        if any(raw[_FIELDS.size - 24 : _FIELDS.size]):
            raise corrupt(path, "reserved bytes", "zero", raw[_FIELDS.size - 24 : _FIELDS.size].hex(" "))
        return header

    def check_fits(
        self, path: str, kind: str, geometry: TileGeometry, capacity: int, max_names: int | None = None
    ) -> None:
        """Raises ValueError for a sound file that a cache of this kind, geometry and capacity cannot hold."""
        asked = {"kind": kind, "dtype": dtype_name(geometry.dtype)}
        found: dict[str, object] = {"kind": self.kind, "dtype": dtype_name(self.dtype)}
        for name in ("tile_size", "head_dim", "value_dim"):
            asked[name], found[name] = getattr(geometry, name), getattr(self, name)
        for name, value in asked.items():
            if found[name] != value:
                raise ValueError(
                    f"{name} of tile file {path} must be {value} like that of the cache, got {found[name]}."
                )
        if self.num_stored > capacity:
            raise ValueError(
                f"stored tiles of tile file {path} must be at most the capacity {capacity}, got {self.num_stored}."
            )
        if max_names is not None and self.num_names > max_names:
            raise ValueError(
                f"names of tile file {path} must be at most {max_names}, all that the cache has places for, "
                f"got {self.num_names}."
            )

    def _sections(self) -> tuple[int, int, int, int]:
        return HEADER_BYTES, self.index_bytes, HEADER_BYTES + self.index_bytes, self.tiles_bytes


def _check_sound(raw: bytes, path: str) -> None:
    """What every version has in the same place, so that a newer file, too, is known to be sound."""
    if not _MAGIC.startswith(raw[:8]):
        raise corrupt(path, "magic", _MAGIC.hex(" "), raw[:8].hex(" "))
    if len(raw) != HEADER_BYTES:
        raise corrupt(path, "header of", f"{HEADER_BYTES} bytes", len(raw))
    is_big_endian = raw[8:12] == _BYTE_ORDER_MARK.to_bytes(4, "big")
    stored = int.from_bytes(raw[-4:], "big" if is_big_endian else "little")
    actual = zlib.crc32(raw[:-4])
    if stored != actual:
        raise corrupt(path, "header checksum", f"{stored:#010x}", f"{actual:#010x}")
    if is_big_endian:
        raise ValueError(f"byte order of tile file {path} must be little, got big.")
