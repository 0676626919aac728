"""Amounts of memory, read and written."""

import pytest

from pagedkv.cli.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    "text, num_bytes",
    [
        ("0", 0),
        ("4096", 4096),
        ("17B", 17),
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("8G", 8 * 2**30),
        ("1.5KiB", 1536),
        (" 2 TiB ", 2 * 2**40),
    ],
)
def test_parse_bytes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 XB", "8GiB free", "1e3", "1..5G"])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="memory must be a number with B, KiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "num_bytes, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (46080, "45.0 KiB"), (3 * 2**29, "1.5 GiB"), (2**41, "2.0 TiB")],
)
def test_format_bytes(num_bytes, text):
    assert format_bytes(num_bytes) == text
