from dataclasses import replace

import pytest

from sandshift.sandbox import shape as shapes
from sandshift.sandbox.shape import Device, MachineShape

DISK = Device(
    "disk0", "scsi-hd", "scsi0.0", "0:0:0", read_only=True, size_bytes=4096, content_digest="sha256:aa"
)
CARD = Device("net0", "virtio-net-pci", "pcie.0", "0x8", mac="52:54:00:00:00:01")
SHAPE = MachineShape(
    machine_type="pc-q35-10.0",
    accelerator="tcg",
    cpu_model="max",
    vcpus=1,
    memory_bytes=256 << 20,
    devices=(DISK, CARD),
    qemu_version="10.0.2",
    kernel_command_line="quiet",
    kernel_sha256="k",
    initramfs_sha256="i",
    uuid="u",
    generation_id="g",
)


def test_disks_and_cards_are_known_by_their_driver():
    assert [shapes.is_disk(device) for device in (DISK, CARD)] == [True, False]
    assert [shapes.is_card(device) for device in (DISK, CARD)] == [False, True]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("10.0.2", (10, 0, 2)),
        ("9.1", (9, 1, 0)),
        (" 7.2.22 (Debian 1:7.2+dfsg-7)", (7, 2, 22)),
        ("unknown", None),
        ("", None),
    ],
)
def test_a_qemu_version_is_read_from_its_text(text, version):
    assert shapes.version_of(text) == version


def test_equal_machines_do_not_differ_and_what_the_guest_cannot_see_does_not_count():
    assert shapes.differences(SHAPE, replace(SHAPE, qemu_version="9.0.0", generation_id="other")) == []


def test_what_differs_is_named_with_both_values():
    other = replace(
        SHAPE, cpu_model="qemu64", devices=(replace(DISK, size_bytes=8192), replace(CARD, id="net1"))
    )
    assert shapes.differences(SHAPE, other) == [
        "cpu_model is 'max' and 'qemu64'",
        "device disk0: size_bytes is 4096 and 8192",
        "device net0 is in one of them only",
        "device net1 is in one of them only",
    ]
