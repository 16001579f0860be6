"""Which modules load, in which order, from kernels that pack them differently."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from sandshift.errors import NotSupported
from sandshift.image import initramfs
from sandshift.image.modules import KernelTree, Module


def module(name: str, needs: str) -> bytes:
    return b"\x7fELF" + b"\0name=" + name.encode() + b"\0depends=" + needs.encode() + b"\0vermagic=x\0"


@pytest.fixture
def kernel(tmp_path) -> Path:
    folder = tmp_path / "6.1.0-test"
    (folder / "kernel/fs").mkdir(parents=True)
    (folder / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\nkernel/fs/over-lay.ko\n")
    (folder / "kernel/fs/erofs.ko").write_bytes(module("erofs", "libcrc32c,netfs"))
    (folder / "kernel/fs/netfs.ko.xz").write_bytes(lzma.compress(module("netfs", "libcrc32c")))
    (folder / "kernel/libcrc32c.ko.gz").write_bytes(gzip.compress(module("libcrc32c", "")))
    (folder / "kernel/virtio-rng.ko").write_bytes(module("virtio_rng", "virtio"))
    return folder


def test_a_module_loads_after_all_that_it_needs(kernel):
    names = [one.name for one in KernelTree(kernel).load_order(("virtio_rng", "erofs", "over_lay"))]
    assert names == ["virtio_rng", "libcrc32c", "netfs", "erofs"]


def test_packed_modules_come_out_unpacked(kernel):
    (loaded, *_) = KernelTree(kernel).load_order(("netfs",))
    assert loaded == Module("libcrc32c", module("libcrc32c", ""), ())


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_modules_packed_with_zstd_come_out_unpacked(kernel):
    packed = subprocess.run(["zstd", "-q"], input=module("zs", ""), capture_output=True, check=True).stdout
    (kernel / "kernel/zs.ko.zst").write_bytes(packed)
    assert KernelTree(kernel).load_order(("zs",)) == [Module("zs", module("zs", ""), ())]


def test_modules_packed_with_zstd_need_zstd(kernel, monkeypatch):
    (kernel / "kernel/zs.ko.zst").write_bytes(b"x")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(NotSupported, match="modules are packed with zstd: apt-get install zstd"):
        KernelTree(kernel).load_order(("zs",))


def test_a_kernel_that_lacks_one_is_refused_by_name(kernel):
    with pytest.raises(NotSupported, match=r"kernel 6.1.0-test has no virtio_scsi"):
        KernelTree(kernel).load_order(("virtio_scsi",))


def test_modules_dep_names_what_is_needed_and_the_script_what_is_loaded():
    modules = [Module("a", b"A", ()), Module("b", b"B", ("a",)), Module("c", b"C", ("b", "built_in"))]
    archive = initramfs.build(b"busybox", modules, "6.1", ("/agent", "-x"))
    assert b"a.ko:\nb.ko: a.ko\nc.ko: b.ko a.ko\n" in archive
    assert b"modprobe -a a b c ||" in archive
    assert b"exec switch_root /root /agent -x\n" in archive
    assert b"@" not in archive.split(b"fail()")[1].split(b"TRAILER")[0]
