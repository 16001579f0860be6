from __future__ import annotations

from pathlib import Path

import pytest

from sandshift.errors import Rejected
from sandshift.rootfs.plan import WRITABLE_ANNOTATION, DiskFile, RootfsPlan, wants_scratch


def test_changes_go_to_guest_memory_unless_the_annotation_asks_for_a_disk() -> None:
    assert not wants_scratch({})
    assert not wants_scratch({WRITABLE_ANNOTATION: "memory"})
    assert wants_scratch({WRITABLE_ANNOTATION: "disk"})


def test_another_value_of_the_annotation_is_refused_by_name() -> None:
    with pytest.raises(Rejected, match="writable = 'yes': it must be"):
        wants_scratch({WRITABLE_ANNOTATION: "yes"})


def test_the_disks_of_a_plan_are_its_layers_and_then_the_writable_one() -> None:
    layer = DiskFile(Path("/l"), "erofs", 4096, "sha256:1", read_only=True)
    writable = DiskFile(Path("/w"), "ext4", 4096, "", read_only=False)
    assert RootfsPlan((layer,)).disks == (layer,)
    assert RootfsPlan((layer,), writable).disks == (layer, writable)
