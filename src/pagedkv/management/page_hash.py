"""A name for every whole page of a prompt that depends on all tokens before it, equal in every process.

digest(page) = SHA-256(digest(page before it) + its token ids, 8 bytes each, little-endian)
digest(page before the first) = SHA-256(namespace_bytes(namespace))
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from .token_ids import TokenArray

__all__ = ["PageHash", "digest_pages", "namespace_bytes", "namespace_digest", "page_bytes", "sha256", "short_hash"]

# Maps the digest before a page, followed by the bytes of its token ids, to the digest of the page.
PageHash = Callable[[bytes], bytes]

_LENGTH_BYTES = _TOKEN_BYTES = 8


def sha256(data: bytes) -> bytes:
    """32 bytes; the hash function of events, and of a hashed cache that is given no other."""
    return hashlib.sha256(data).digest()


def digest_pages(before: bytes, token_ids: TokenArray, page_size: int, page_hash: PageHash = sha256) -> list[bytes]:
    """The digest of each whole page of `token_ids`, a run that continues what has the digest `before`.

    Shapes: token_ids [n] int64; the result [n // page_size].
    Cost:   one call of the hash function a page.

    >>> ids = np.array([1, 2, 3, 4, 5])
    >>> first, second = digest_pages(namespace_digest(None), ids, page_size=2)
    >>> digest_pages(first, ids[2:], page_size=2) == [second]
    True
    """
    digests = []
    for tokens in page_bytes(token_ids, page_size):
        before = page_hash(before + tokens)
        digests.append(before)
    return digests


def page_bytes(token_ids: TokenArray, page_size: int) -> Iterator[bytes]:
    """The token ids of each whole page, as they are hashed."""
    raw, num_bytes = token_ids.astype("<i8", copy=False).tobytes(), page_size * _TOKEN_BYTES
    for start in range(0, len(raw) - num_bytes + 1, num_bytes):
        yield raw[start : start + num_bytes]


def namespace_digest(namespace: object, page_hash: PageHash = sha256) -> bytes:
    """What stands before the first page of every prompt of `namespace`."""
    return page_hash(namespace_bytes(namespace))


def namespace_bytes(namespace: object) -> bytes:
    """Bytes that are equal only for equal values of equal types, at every depth of a tuple.

    Layout: a letter for the type (N None, B bool, I int, S str, Y bytes, T tuple), the number of bytes that follow, 8
            bytes little-endian, and these: UTF-8, a little-endian two's complement, or the fields of a tuple in turn.

    >>> namespace_bytes(("ab", "c")) == namespace_bytes(("a", "bc"))
    False
    """
    letter, body = _letter_and_body(namespace)
    return letter + len(body).to_bytes(_LENGTH_BYTES, "little") + body


def _letter_and_body(value: Any) -> tuple[bytes, bytes]:
    if isinstance(value, tuple):
        return b"T", b"".join(map(namespace_bytes, value))
    if value is None:
        return b"N", b""
    kind = type(value)
    if kind is bool:
        return b"B", bytes([value])
    if kind is int:
        return b"I", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if kind is str:
        return b"S", value.encode("utf-8", "surrogatepass")
    if kind is bytes:
        return b"Y", value
    raise TypeError(f"namespace must be None, a str, bytes, an int or a tuple of these, got {kind.__name__}.")


def short_hash(digest: bytes) -> int:
    """The first 8 bytes of a digest as a signed number, big-endian: what events publish."""
    return int.from_bytes(digest[:8], "big", signed=True)
