from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandshift.errors import NotSupported, Unavailable
from sandshift.vmm.digest import PAGE_BYTES, digest_of_file, memory_digest_of_process, memory_file

SIZE = 64 * PAGE_BYTES


def file_with(path: Path, pages: dict[int, bytes]) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, SIZE)
    for number, content in pages.items():
        os.pwrite(fd, content.ljust(PAGE_BYTES, b"\0"), number * PAGE_BYTES)
    return fd


def test_a_hole_and_a_page_of_zeros_are_the_same_memory(tmp_path: Path) -> None:
    with_hole = file_with(tmp_path / "one", {3: b"x"})
    with_zeros = file_with(tmp_path / "other", {3: b"x", 4: b"", 60: b""})
    assert digest_of_file(with_hole, SIZE) == digest_of_file(with_zeros, SIZE)


def test_one_bit_makes_another_memory(tmp_path: Path) -> None:
    one = file_with(tmp_path / "one", {3: b"x", 9: b"\x01"})
    other = file_with(tmp_path / "other", {3: b"x", 9: b"\x02"})
    assert digest_of_file(one, SIZE) != digest_of_file(other, SIZE)


def test_the_same_page_elsewhere_is_another_memory(tmp_path: Path) -> None:
    one = file_with(tmp_path / "one", {3: b"x"})
    other = file_with(tmp_path / "other", {4: b"x"})
    assert digest_of_file(one, SIZE) != digest_of_file(other, SIZE)


def test_empty_memory_has_a_digest_too(tmp_path: Path) -> None:
    assert len(digest_of_file(file_with(tmp_path / "one", {}), SIZE)) == 16


def test_reading_does_not_fill_holes(tmp_path: Path) -> None:
    fd = os.memfd_create("holes")
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"x", 5 * PAGE_BYTES)
    before = os.fstat(fd).st_blocks
    digest_of_file(fd, SIZE)
    assert os.fstat(fd).st_blocks == before


def test_the_memory_is_found_by_name_and_size() -> None:
    small, right = os.memfd_create("memory-backend-memfd"), os.memfd_create("memory-backend-memfd")
    os.ftruncate(small, SIZE // 2)
    os.ftruncate(right, SIZE)
    os.pwrite(right, b"content", 0)
    assert memory_file(os.getpid(), SIZE).name == str(right)
    assert memory_digest_of_process(os.getpid(), SIZE) == digest_of_file(right, SIZE)
    with pytest.raises(NotSupported, match="start it with shared memory"):
        memory_file(os.getpid(), SIZE * 3)
    os.close(small)
    os.close(right)


def test_a_process_that_is_gone_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="VM process 4194305 is gone or not ours"):
        memory_file(4194305, SIZE)
