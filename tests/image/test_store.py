"""Images on disk: whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from sandshift.errors import Damaged, Rejected
from sandshift.image import store
from sandshift.image.store import Description


def description(recipe: str, root: bytes = b"root") -> Description:
    return Description(
        recipe=recipe,
        own_digest="own",
        builder="builder",
        distribution="debian 12",
        kernel_release="6.1",
        kernel_command_line="quiet",
        kernel_sha256=hashlib.sha256(b"kernel").hexdigest(),
        initramfs_sha256=hashlib.sha256(b"initramfs").hexdigest(),
        root_sha256=hashlib.sha256(root).hexdigest(),
        root_bytes=len(root),
        python="3.11",
        agent_version="0.1.0",
        packages=("runc 1.1",),
    )


def publish(cache: Path, recipe: str) -> store.GuestImage:
    with store.locked(cache), store.workshop(cache) as work:
        built = work / "built"
        built.mkdir()
        (built / store.KERNEL).write_bytes(b"kernel")
        (built / store.INITRAMFS).write_bytes(b"initramfs")
        (built / store.ROOT).write_bytes(b"root")
        return store.publish(cache, built, description(recipe))


def test_what_is_published_is_found_and_verified(tmp_path):
    image = publish(tmp_path, "a" * 64)
    assert store.published(tmp_path) == [image]
    assert image.root_digest == "sha256:" + hashlib.sha256(b"root").hexdigest()
    assert (image.kernel.name, image.initramfs.name, image.root.name) == (
        "vmlinuz",
        "initramfs.cpio",
        "root.erofs",
    )
    image.verify()
    assert not list(store.images_folder(tmp_path).glob(".work-*"))


def test_a_changed_file_is_damage_and_says_what_to_do(tmp_path):
    image = publish(tmp_path, "a" * 64)
    image.root.chmod(0o600)
    image.root.write_bytes(b"toor")
    with pytest.raises(
        Damaged, match=r"root.erofs is not what image.json says: delete .*, then build the image again"
    ):
        image.verify()


@pytest.mark.parametrize("missing", [store.KERNEL, store.INITRAMFS, store.ROOT, store.DESCRIPTION])
def test_an_image_that_lacks_a_file_is_none_and_can_be_made_again(tmp_path, missing):
    image = publish(tmp_path, "a" * 64)
    (image.folder / missing).unlink()
    assert store.published(tmp_path) == []
    assert store.load(image.folder) is None
    assert store.load(publish(tmp_path, "a" * 64).folder) is not None


def test_a_root_that_was_cut_off_is_none(tmp_path):
    image = publish(tmp_path, "a" * 64)
    image.root.chmod(0o600)
    image.root.write_bytes(b"ro")
    assert store.published(tmp_path) == []


def test_a_cache_that_cannot_be_made_is_refused_with_the_key_to_set(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(Rejected, match=r"cannot be written: Not a directory; set places.cache_dir"),
        store.locked(tmp_path / "file"),
    ):
        pass


def test_what_a_killed_builder_left_is_removed_by_the_next(tmp_path):
    left = store.images_folder(tmp_path) / ".work-left"
    left.mkdir(parents=True)
    publish(tmp_path, "a" * 64)
    assert not left.exists()


def test_images_that_were_not_used_for_longest_go(tmp_path):
    images = [publish(tmp_path, letter * 64) for letter in "abc"]
    for age, image in enumerate(images):
        os.utime(image.folder / store.DESCRIPTION, (1000 - age, 1000 - age))
    store.mark_used(images[2])
    assert store.prune(tmp_path, count_max=2) == [images[1]]
    assert store.published(tmp_path) == [images[2], images[0]]
