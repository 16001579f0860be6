"""Sizes in and out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.cli.sizes import parse_bytes, show_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("256", 256 * MIB),
        ("256M", 256 * MIB),
        ("256MiB", 256 * MIB),
        ("1.5G", 1536 * MIB),
        ("4k", 4096),
        ("1TB", 1 << 40),
    ],
)
def test_sizes_are_read_in_powers_of_1024_and_without_a_unit_as_mebibytes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "M", "-1", "1 X", "0x10", "1e3", "ten"])
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size: write 512, 512M or 1\.5G"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (256 * MIB, "256.0 MiB"), (1 << 40, "1.0 TiB")],
)
def test_sizes_are_shown_with_one_digit(size_bytes: int, text: str) -> None:
    assert show_bytes(size_bytes) == text


@given(st.integers(0, 1 << 60))
def test_what_is_shown_is_within_a_tenth_of_what_it_was(size_bytes: int) -> None:
    shown = show_bytes(size_bytes)
    if not shown.endswith(" B"):
        assert parse_bytes(shown) == pytest.approx(size_bytes, rel=0.06)
