"""Which files of a host are the disks of a container that comes from elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sandshift.errors import IllegalMove
from sandshift.rootfs.plan import EROFS, EXT4, DiskFile, RootfsPlan
from sandshift.sandbox.model import Container
from sandshift.shim.tasks.disk_matching import match, needs_disks
from sandshift.vmm.standard import DiskPlan, standard_shape

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")
SHAPE = standard_shape(
    machine_type="pc-q35-10.0",
    accelerator="tcg",
    cpu_model="max",
    qemu_version="10.0.2",
    memory_bytes=64 << 20,
    vcpus=1,
    kernel_command_line="",
    kernel_sha256="",
    initramfs_sha256="",
    uuid="u",
    generation_id="g",
    disks=[DiskPlan(4096, digest) for digest in ("sha256:root", A, B, C)],
)
WEB = Container("web", "web", layers=("disk2", "disk1"), mounts=("disk3",))


def file(digest: str) -> DiskFile:
    return DiskFile(Path(f"/cache/{digest[-4:]}"), EROFS, 4096, digest, read_only=True)


def test_disks_of_the_same_content_are_found_in_their_order() -> None:
    found = match(WEB, SHAPE, RootfsPlan((file(B), file(A))), [file(C)])
    assert found == {"disk2": file(B), "disk1": file(A), "disk3": file(C)}


def test_other_content_is_refused_with_both_digests_for_each_disk() -> None:
    with pytest.raises(IllegalMove) as refused:
        match(WEB, SHAPE, RootfsPlan((file(B), file(C))), [file(A)])
    assert refused.value.message == (
        "container web has other files here than on the source: "
        f"layer disk1 is {A} there and {C} here; mounted folder disk3 is {C} there and {A} here: give it the same image, "
        "of the same platform, and the same mounts"
    )


def test_another_number_of_layers_is_refused_with_both_numbers() -> None:
    with pytest.raises(IllegalMove, match="2 of layer there, 1 here; 1 of mounted folder there, 0 here"):
        match(WEB, SHAPE, RootfsPlan((file(B),)))


def test_what_a_snapshotter_has_for_changes_is_not_used() -> None:
    writable = DiskFile(Path("/scratch"), EXT4, 4096, "", read_only=False)
    assert "disk3" in match(WEB, SHAPE, RootfsPlan((file(B), file(A)), writable), [file(C)])


def test_a_container_without_disks_needs_none() -> None:
    assert needs_disks(WEB)
    assert not needs_disks(replace(WEB, layers=(), mounts=()))
