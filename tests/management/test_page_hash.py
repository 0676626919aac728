import hashlib
import struct

import numpy as np
import pytest

from pagedkv.management.page_hash import digest_pages, namespace_bytes, namespace_digest, sha256, short_hash
from pagedkv.management.prefix_cache import namespace_key

NAMESPACES = [
    None, "", b"", 0, False, (), 1, True, -1, 127, 128, 255, 256, -128, -129, 2**63, -(2**63), 2**64, 10**40, "a", b"a",
    "1", "ab", "None", "\0", "\0\0", "é", "e\u0301", "\ud800", "\U00010000", "\ud800\udc00", (None,), ("",), ((),),
    ("a", "b"), ("ab",), ("ab", ""), ("", "ab"), (("a",), "b"), ("a", ("b",)), (("a", "b"),), ((("a",),),), (b"a", "b"),
    (0, 1), (False, 1), (1, 0), (256,), (0, 0, 1), namespace_bytes(("a",)), (namespace_bytes("a"),),
]  # fmt: skip


def ids(*numbers):
    return np.array(numbers, np.int64)


def test_digest_is_the_chain_that_the_docstring_names():
    """Written out with struct and hashlib alone, as a router in another language would."""
    namespace = hashlib.sha256(b"S" + struct.pack("<q", 6) + b"tenant").digest()
    first = hashlib.sha256(namespace + struct.pack("<3q", 5, 0, 2**40)).digest()
    second = hashlib.sha256(first + struct.pack("<3q", 1, 2, 3)).digest()
    assert digest_pages(namespace_digest("tenant"), ids(5, 0, 2**40, 1, 2, 3, 9), 3) == [first, second]
    assert short_hash(second) == struct.unpack(">q", second[:8])[0]


@pytest.mark.parametrize("page_size", [1, 2, 16, 256])
def test_pages_are_counted_down_to_whole_ones(page_size):
    before = namespace_digest(None)
    for length in {0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size - 1}:
        digests = digest_pages(before, np.arange(length), page_size)
        assert len(digests) == length // page_size
        assert digests == digest_pages(before, np.arange(3 * page_size), page_size)[: len(digests)]


def test_a_run_continues_where_another_ended():
    before, tokens = namespace_digest(("a", 1)), np.arange(10)
    whole = digest_pages(before, tokens, 2)
    assert digest_pages(whole[1], tokens[4:], 2) == whole[2:]


def test_every_token_before_counts():
    tokens = np.arange(8)
    usual = digest_pages(namespace_digest(None), tokens, 2)
    for position in range(8):
        changed = tokens.copy()
        changed[position] += 1
        others = digest_pages(namespace_digest(None), changed, 2)
        agree = [one == other for one, other in zip(usual, others, strict=True)]
        assert agree == [page < position // 2 for page in range(4)]
    assert not set(usual) & set(digest_pages(namespace_digest(None), tokens, 1))


def test_strided_and_shorter_integers_hash_as_their_values():
    wanted = digest_pages(namespace_digest(None), np.arange(4), 2)
    assert digest_pages(namespace_digest(None), np.repeat(np.arange(4), 2)[::2], 2) == wanted
    assert digest_pages(namespace_digest(None), np.arange(4, dtype=np.int32), 2) == wanted
    assert digest_pages(namespace_digest(None), np.arange(4, dtype=">i8"), 2) == wanted


def test_another_hash_function_is_used_throughout():
    seen = []

    def length_of(data):
        seen.append(len(data))
        return bytes([len(data) % 256])

    assert digest_pages(namespace_digest(None, length_of), ids(1, 2), 1, length_of) == [b"\x09", b"\x09"]
    assert seen == [9, 9, 9]


def test_two_namespaces_never_collide():
    """Found by both keys: the dictionary's and the bytes that are hashed."""
    assert len({namespace_bytes(namespace) for namespace in NAMESPACES}) == len(NAMESPACES)
    assert len({namespace_key(namespace) for namespace in NAMESPACES}) == len(NAMESPACES)
    assert [namespace_bytes(namespace) for namespace in NAMESPACES] == list(map(namespace_bytes, NAMESPACES))


@pytest.mark.parametrize("namespace", [1.5, ["a"], ("a", ["b"]), object(), np.int64(3), np.str_("a")])
def test_other_namespaces_are_refused(namespace):
    with pytest.raises(TypeError, match="namespace must be None, a str, bytes, an int or a tuple of these, got"):
        namespace_bytes(namespace)


def test_sha256_is_sha256():
    assert sha256(b"abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    "first_bytes, value", [("0000000000000001", 1), ("7fffffffffffffff", 2**63 - 1), ("ffffffffffffffff", -1)]
)
def test_short_hash_is_signed_and_big_endian(first_bytes, value):
    assert short_hash(bytes.fromhex(first_bytes) + bytes(24)) == value
