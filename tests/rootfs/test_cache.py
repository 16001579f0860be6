from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sandshift.errors import NoRoom
from sandshift.rootfs import cache as cache_module
from sandshift.rootfs.cache import KEPT_S, CachedImage, ImageCache, is_in_use, over_limits, require_space

OLD_S = 1_000_000.0


def image(name: str, size_bytes: int, used_at_s: float) -> CachedImage:
    return CachedImage(Path(f"/{name}.erofs"), size_bytes, used_at_s)


def names(images: list[CachedImage]) -> list[str]:
    return [one.path.stem for one in images]


def published(cache: ImageCache, content: bytes, *, used_at_s: float = OLD_S) -> CachedImage:
    with cache.new_file() as file:
        file.write_bytes(content)
        made = cache.publish(file)
    os.utime(made.path, (used_at_s, used_at_s))
    return made


def test_the_longest_unasked_go_first_when_there_are_too_many() -> None:
    images = [image("b", 1, 2), image("c", 1, 3), image("a", 1, 1)]
    dropped = over_limits(images, now_s=OLD_S, count_max=1, bytes_max=100)
    assert names(dropped) == ["a", "b"]


def test_what_does_not_fit_goes_and_what_fits_stays() -> None:
    images = [image("new", 60, 4), image("big", 50, 3), image("small", 40, 2)]
    assert names(over_limits(images, now_s=OLD_S, count_max=9, bytes_max=100)) == ["big"]


def test_what_was_asked_for_lately_stays_whatever_the_limits() -> None:
    images = [
        image("now", 60, OLD_S),
        image("lately", 60, OLD_S - KEPT_S + 1),
        image("before", 1, OLD_S - KEPT_S),
    ]
    assert names(over_limits(images, now_s=OLD_S, count_max=1, bytes_max=60)) == ["before"]


def test_a_published_image_is_found_by_its_key_and_marked_as_asked_for(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    made = published(cache, b"content")
    assert cache.find("ab") is None
    cache.note("ab", made)
    began = time.time() - 1
    found = cache.find("ab")
    assert found is not None
    assert (found.path, found.digest, found.size_bytes) == (made.path, made.digest, 7)
    assert made.path.stat().st_mtime >= began
    made.path.chmod(0o600)
    made.path.write_bytes(b"cut")
    assert cache.find("ab") is None


def test_the_same_content_published_twice_is_one_file_that_stays_as_it_is(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    first = published(cache, b"content")
    inode = first.path.stat().st_ino
    assert published(cache, b"content").path == first.path
    assert first.path.stat().st_ino == inode
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def test_a_file_that_was_not_published_is_gone(tmp_path: Path) -> None:
    with ImageCache(tmp_path).new_file() as file:
        file.write_bytes(b"half")
    assert list((tmp_path / "rootfs/images").iterdir()) == []


def test_pruning_takes_the_index_along(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, count_max=1)
    old, new = published(cache, b"old", used_at_s=1), published(cache, b"new", used_at_s=2)
    cache.note("aa", old)
    cache.note("bb", new)
    assert names(cache.prune()) == [old.path.stem]
    assert sorted(path.name for path in (tmp_path / "rootfs/index").iterdir()) == ["bb"]


def test_the_index_and_the_digests_keep_their_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "INDEX_MAX", 2)
    cache = ImageCache(tmp_path)
    made = published(cache, b"content")
    for number in range(3):
        cache.note(f"a{number}", made)
        cache.note_digest(f"d{number}", f"sha256:{number}")
        for folder, name in (("index", f"a{number}"), ("digests", f"d{number}")):
            os.utime(tmp_path / "rootfs" / folder / name, (number, number))
    cache.prune()
    cache.note_digest("d3", "sha256:3")
    assert sorted(path.name for path in (tmp_path / "rootfs/index").iterdir()) == ["a1", "a2"]
    assert cache.known_digest("d3") == "sha256:3"
    assert cache.known_digest("d0") is None


def test_what_a_dead_packer_left_goes_and_what_a_living_one_packs_stays(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    with cache.new_file() as file:
        left = file.with_name(".packing-left")
        left.write_bytes(b"half")
        cache.prune()
        assert file.exists()
        assert not left.exists()


def test_an_image_with_a_lock_as_qemu_holds_it_is_in_use(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, count_max=0)
    made = published(cache, b"content", used_at_s=1)
    assert not is_in_use(made.path)
    with made.path.open("rb") as file:
        # One byte, shared: what QEMU holds for "I read this image consistently".
        lock = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 101, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        assert is_in_use(made.path)
        assert cache.prune() == []
        assert made.path.exists()
    assert names(cache.prune()) == [made.path.stem]


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")
def test_an_image_that_a_qemu_has_as_a_disk_is_in_use_until_it_ends(tmp_path: Path) -> None:
    made = published(ImageCache(tmp_path), b"\0" * 4096, used_at_s=1)
    blockdev = f'{{"driver":"raw","node-name":"a","read-only":true,"file":{{"driver":"file","filename":"{made.path}","read-only":true}}}}'
    command = [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-machine",
        "q35",
        "-m",
        "16",
        "-S",
        "-display",
        "none",
        "-nodefaults",
    ]
    command += [
        "-blockdev",
        blockdev,
        "-device",
        "virtio-scsi-pci",
        "-device",
        "scsi-hd,drive=a",
        "-qmp",
        "stdio",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        assert b"QMP" in qemu.stdout.readline()
        qemu.stdin.write(b'{"execute": "qmp_capabilities"}\n')
        qemu.stdin.flush()
        assert b"return" in qemu.stdout.readline()  # From its main loop: the disks are open.
        assert is_in_use(made.path)
        qemu.kill()
    assert not is_in_use(made.path)


def test_only_one_at_a_time_works_on_a_key_whatever_process_it_is_in(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    program = (
        "import sys; from pathlib import Path; from sandshift.rootfs.cache import ImageCache\n"
        f"with ImageCache(Path({str(tmp_path)!r})).locked('k'): print('in', flush=True); sys.stdin.read()"
    )
    got = threading.Event()

    def wait() -> None:
        with cache.locked("k"):
            got.set()

    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.05)
        assert not got.is_set()
        other.kill()
    thread.join(10)
    assert got.is_set()


def test_no_space_is_said_before_anything_is_packed(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(NoRoom, match="MiB left and a root file system of 1099511627776 MiB is to be packed"):
        require_space(tmp_path, 1 << 60)
