"""The archive writer, held against the kernel's format and against busybox's reader."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from sandshift.image import cpio


def test_an_entry_is_laid_out_as_documented():
    data = cpio.archive([cpio.plain("a", b"hi")])
    assert data[:110] == (
        b"070701"
        b"00000001"
        b"000081A4"
        b"00000000"
        b"00000000"
        b"00000001"
        b"00000000"
        b"00000002"
        b"00000000"
        b"00000000"
        b"00000000"
        b"00000000"
        b"00000002"
        b"00000000"
    )
    assert data[110:112] == b"a\0"
    assert data[112:116] == b"hi\0\0"
    assert b"TRAILER!!!\0" in data
    assert len(data) % 512 == 0


def test_the_order_of_entries_and_missing_folders_make_no_difference():
    one, two = cpio.plain("x/y/file", b"1"), cpio.executable("x/run", b"2")
    assert cpio.archive([one, two]) == cpio.archive([two, one, cpio.folder("x"), cpio.folder("x/y")])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([cpio.plain("a", b""), cpio.plain("a", b"")], "a is in the archive twice"),
        ([cpio.plain("/a", b"")], "'/a' is not a relative path"),
        ([cpio.plain("", b"")], "'' is not a relative path"),
    ],
)
def test_what_the_kernel_would_misread_is_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        cpio.archive(entries)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_reads_it_back(tmp_path):
    data = cpio.archive(
        [
            cpio.executable("bin/tool", b"#!"),
            cpio.link("bin/alias", "tool"),
            cpio.plain("etc/long", bytes(5000)),
        ]
    )
    subprocess.run(["cpio", "-idm", "--quiet"], cwd=tmp_path, input=data, check=True)
    assert (tmp_path / "bin/tool").read_bytes() == b"#!"
    assert (tmp_path / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "bin/alias").readlink().name == "tool"
    assert (tmp_path / "etc/long").read_bytes() == bytes(5000)
