from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sandshift.errors import NoRoom
from sandshift.rootfs import tree
from sandshift.rootfs.tree import digest_of, fingerprint_of


def made(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "inner" / "b").write_text("2")
    (folder / "link").symlink_to("/etc/passwd")
    return folder


def test_the_same_content_has_the_same_digest_wherever_and_whenever_it_was_written(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one"), made(tmp_path / "other")
    os.utime(other / "a", (1, 1))
    assert digest_of(str(one)).digest == digest_of(str(other)).digest
    assert digest_of(str(one)).entries == 5
    assert digest_of(str(one)).size_bytes == 2


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda folder: (folder / "a").write_text("9"),
    "name": lambda folder: (folder / "a").rename(folder / "c"),
    "place": lambda folder: (folder / "a").rename(folder / "inner" / "a"),
    "mode": lambda folder: (folder / "a").chmod(0o600),
    "mode of the root": lambda folder: folder.chmod(0o700),
    "target of a link": lambda folder: (
        (folder / "link").unlink(),
        (folder / "link").symlink_to("/etc/shadow"),
    ),
    "an empty folder more": lambda folder: (folder / "inner" / "new").mkdir(),
    "a hard link": lambda folder: (folder / "h").hardlink_to(folder / "a"),
    "kind": lambda folder: ((folder / "a").unlink(), os.mkfifo(folder / "a")),
    "extended attribute": lambda folder: os.setxattr(folder / "a", "user.x", b"1"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_every_change_that_a_container_could_see_gives_another_digest(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    folder = made(tmp_path / "one")
    before = digest_of(str(folder))
    change(folder)
    after = digest_of(str(folder))
    assert before.digest != after.digest
    assert before.fingerprint != after.fingerprint
    assert after.fingerprint == fingerprint_of(str(folder))


def test_two_names_of_one_file_are_not_two_files(tmp_path: Path) -> None:
    linked, copied = made(tmp_path / "one"), made(tmp_path / "other")
    (linked / "h").hardlink_to(linked / "a")
    (copied / "h").write_text("1")
    assert digest_of(str(linked)).digest != digest_of(str(copied)).digest


def test_a_rewrite_with_the_same_content_is_seen_by_the_fingerprint_alone(tmp_path: Path) -> None:
    folder = made(tmp_path / "one")
    before = digest_of(str(folder))
    (folder / "a").unlink()
    (folder / "a").write_text("1")
    os.utime(folder / "a", (5, 5))
    after = digest_of(str(folder))
    assert before.digest == after.digest
    assert before.fingerprint != after.fingerprint


def test_a_tree_is_walked_as_deep_as_paths_go(tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    at = os.open(deep, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=at)
        inner = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)
    try:
        assert digest_of(str(deep)).entries == 1501
    finally:
        subprocess.run(["rm", "-rf", str(deep)], check=True)  # Too deep for Python's own.


def test_names_that_are_no_text_are_told_apart(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, name in ((one, b"\xff"), (other, b"\xfe")):
        folder.mkdir()
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("")
    assert digest_of(str(one)).digest != digest_of(str(other)).digest


def test_more_than_a_root_file_system_may_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "one")
    monkeypatch.setattr(tree, "TREE_BYTES_MAX", 1)
    with pytest.raises(NoRoom, match="root file system: more than 1 bytes"):
        digest_of(str(folder))
    monkeypatch.setattr(tree, "ENTRIES_MAX", 3)
    with pytest.raises(NoRoom, match="more than 3 files and folders"):
        digest_of(str(folder))
