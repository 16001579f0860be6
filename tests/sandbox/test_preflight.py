from dataclasses import replace

import pytest

from sandshift.errors import Blocker
from sandshift.sandbox import preflight
from sandshift.sandbox.model import Container, NetworkCard, Process, Sandbox
from sandshift.sandbox.preflight import DestinationFacts, DiskFacts, destination_blockers, source_blockers
from sandshift.sandbox.shape import Device, MachineShape

DISK = Device(
    "disk0",
    "scsi-hd",
    "scsi0.0",
    "0:0:0",
    read_only=True,
    size_bytes=4096,
    content_digest="sha256:" + "a" * 64,
)
CARD = Device("net0", "virtio-net-pci", "pcie.0", "0x8", mac="52:54:00:00:00:01")
PORT = Device("serial0", "virtio-serial-pci", "pcie.0", "0x5")
SHAPE = MachineShape(
    machine_type="pc-q35-10.0",
    accelerator="tcg",
    cpu_model="max",
    vcpus=1,
    memory_bytes=256 << 20,
    devices=(PORT, CARD, DISK),
    qemu_version="10.0.2",
    kernel_command_line="quiet",
    kernel_sha256="k" * 64,
    initramfs_sha256="i" * 64,
    uuid="u",
    generation_id="g",
)
SANDBOX = Sandbox("box", network_cards=(NetworkCard("net0", CARD.mac, ("10.9.0.50/24",)),))
FIT = DestinationFacts(
    qemu_version="10.0.2",
    accelerator="tcg",
    machine_types=frozenset({"pc-q35-10.0", "pc-q35-9.2"}),
    cpu_models=frozenset({"max", "qemu64"}),
    drivers=frozenset({"scsi-hd", "virtio-net-pci", "virtio-serial-pci"}),
    memory_free_bytes=352 << 20,
    kernel_sha256="k" * 64,
    initramfs_sha256="i" * 64,
    disks={"disk0": DiskFacts(4096, DISK.content_digest)},
    addresses={"net0": ("10.9.0.50/24",)},
)
KEY = "io.microsoft.migration.support-enabled"


def lines(blockers):
    return [str(blocker) for blocker in blockers]


def test_a_sandbox_that_fits_meets_no_blocker():
    assert source_blockers(SANDBOX, SHAPE) == []
    assert destination_blockers(SANDBOX, SHAPE, FIT) == []


def test_what_is_not_known_is_held_against_nobody():
    unknown = DestinationFacts("10.0.2", "tcg", frozenset({"pc-q35-10.0"}))
    assert destination_blockers(SANDBOX, SHAPE, unknown) == []


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("false", f"annotation {KEY} is 'false'"),
        ("perhaps", f"annotation {KEY} is 'perhaps', which is neither true nor false"),
    ],
)
def test_an_annotation_that_does_not_say_yes_blocks(value, problem):
    found = source_blockers(replace(SANDBOX, annotations={KEY: value}), SHAPE)
    assert found == [Blocker("sandbox.annotations", problem, "create the sandbox without it, or with true")]


@pytest.mark.parametrize("version", ["7.2.22 (Debian)", "8.2.10", "unknown"])
def test_an_old_qemu_under_tcg_is_refused_on_both_sides(version):
    old = replace(SHAPE, qemu_version=version)
    said = f"QEMU {version} loses guest writes in a live migration under TCG; install QEMU 9.0 or newer there"
    assert lines(source_blockers(SANDBOX, old))[0].startswith(f"qemu.version: the source's {said}")
    here = destination_blockers(
        SANDBOX, replace(SHAPE, cpu_model="qemu64"), replace(FIT, qemu_version=version)
    )
    assert [blocker.subject for blocker in here] == ["qemu.version"]
    assert str(here[0]).startswith(f"qemu.version: this host's {said}")


def test_an_old_qemu_under_kvm_is_fit():
    shape = replace(SHAPE, qemu_version="7.2.22", accelerator="kvm", cpu_model="Nehalem")
    facts = replace(FIT, qemu_version="7.2.22", accelerator="kvm", cpu_models=frozenset({"Nehalem"}))
    assert source_blockers(SANDBOX, shape) == []
    assert destination_blockers(SANDBOX, shape, facts) == []


def test_a_container_with_a_scratch_disk_is_named():
    scratch = Device("disk3", "scsi-hd", "scsi0.0", "0:0:3", size_bytes=1 << 30)
    shape = replace(SHAPE, devices=(*SHAPE.devices, scratch))
    sandbox = replace(SANDBOX, containers=(Container("g1", "web", writable="disk3", started=True),))
    assert lines(source_blockers(sandbox, shape)) == [
        (
            "container.web: its changes are on a writable disk (disk3), whose content does not move; keep them in the guest's "
            "memory: create the container without annotation io.sandshift.rootfs.writable, from a snapshotter that gives "
            "read-only layers"
        )
    ]
    assert source_blockers(sandbox, shape, mirrors_disks=True) == []


def test_a_container_that_was_not_started_is_named():
    sandbox = replace(SANDBOX, containers=(Container("g1", "web"), Container("g2", "db", started=True)))
    assert lines(source_blockers(sandbox, SHAPE)) == [
        (
            "container.web: it was created and not started, and a Task.Start at the destination starts nothing; start or "
            "delete it, then migrate"
        )
    ]


def test_an_alias_for_a_machine_and_a_cpu_that_is_the_hosts_block():
    found = lines(
        source_blockers(SANDBOX, replace(SHAPE, machine_type="q35", accelerator="kvm", cpu_model="host"))
    )
    assert found[0].startswith(
        "machine.cpu: model host is whatever the source host has; start the sandbox with a named"
    )
    assert found[1].startswith("machine.type: q35 is an alias, which means another machine in every QEMU;")


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        (
            Device("gpu", "vfio-pci", "pcie.0", "0x9"),
            "device.gpu: vfio-pci cannot move: it is a piece of the source host's",
        ),
        (
            Device("x", "e1000", "pcie.0", "0x9"),
            "device.x: e1000 cannot move: nobody has shown that QEMU sends all of its",
        ),
        (
            replace(DISK, read_only=False),
            "device.disk0: it is a writable disk, whose content does not move; keep what",
        ),
        (
            replace(DISK, content_digest=""),
            "device.disk0: the content of this read-only disk has no digest to hold",
        ),
        (
            replace(CARD, mac=""),
            "device.net0: the card has no MAC of its own; start the sandbox anew with one",
        ),
    ],
)
def test_a_device_that_cannot_move_blocks_and_says_why(device, problem):
    found = lines(source_blockers(SANDBOX, replace(SHAPE, devices=(device,))))
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_a_writable_disk_moves_where_disks_are_mirrored():
    shape = replace(SHAPE, devices=(replace(DISK, read_only=False, content_digest=""),))
    assert source_blockers(SANDBOX, shape, mirrors_disks=True) == []


def test_more_streams_than_fit_into_the_handover_block():
    def sandbox(count):
        processes = tuple(Process("p" * 76) for _ in range(count))
        return replace(
            SANDBOX,
            processes=processes[: count // 2],
            containers=(Container("g", "c", 1, processes[count // 2 :], started=True),),
        )

    assert source_blockers(sandbox(142), SHAPE) == []
    assert lines(source_blockers(sandbox(143), SHAPE)) == [
        (
            "sandbox.processes: the streams of 143 processes need 41184 bytes in the handover, which has 40960; end or forget "
            "some of them"
        )
    ]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {"accelerator": "kvm"},
            "machine.accelerator: the guest runs on tcg, this host would run it on kvm; set vm.",
        ),
        (
            {"machine_types": frozenset({"pc-q35-9.2"})},
            "machine.type: QEMU 10.0.2 has no pc-q35-10.0; install QEMU 10.0 or newer on this host, or choose another",
        ),
        (
            {"cpu_models": frozenset({"qemu64"})},
            "machine.cpu: QEMU 10.0.2 on this host has no model max; choose another",
        ),
        (
            {"qemu_version": "10.1.0"},
            "machine.cpu: model max may be another in QEMU 10.1.0 than in the source's 10.0.2; install the same release",
        ),
        (
            {"memory_free_bytes": (352 << 20) - 1},
            "host.memory: the VM needs 352 MiB and this host has 351 MiB free; free memory on this host, or choose",
        ),
        (
            {"kernel_sha256": "z" * 64},
            "image.kernel: the guest was booted from kkkkkkkkkkkk, this host has zzzzzzzzzzzz: it could not reboot; build",
        ),
        (
            {"initramfs_sha256": "z" * 64},
            "image.initramfs: the guest was booted from iiiiiiiiiiii, this host has",
        ),
        (
            {"drivers": frozenset({"scsi-hd", "virtio-serial-pci"})},
            "device.net0: QEMU 10.0.2 on this host has no virtio-net-pci; install QEMU's device modules on this host",
        ),
        (
            {"disks": {}},
            "device.disk0: this host has no disk with content aaaaaaaaaaaa; bring the same content to this",
        ),
        (
            {"disks": {"disk0": DiskFacts(4096, "sha256:" + "b" * 64)}},
            "device.disk0: its content is aaaaaaaaaaaa on the source and bbbbbbbbbbbb here; bring the same content",
        ),
        (
            {"disks": {"disk0": DiskFacts(8192)}},
            "device.disk0: it has 4096 bytes on the source and 8192 here; bring the same content",
        ),
        (
            {"addresses": {"net0": ("10.9.0.51/24",)}},
            "network.net0: the guest has 10.9.0.50/24, this host's network gives 10.9.0.51/24; reserve the guest's",
        ),
        (
            {"addresses": {"net0": ()}},
            "network.net0: the guest has 10.9.0.50/24, this host's network gives nothing;",
        ),
    ],
)
def test_what_this_host_lacks_or_has_otherwise_blocks_with_a_remedy(facts, expected):
    found = lines(destination_blockers(SANDBOX, SHAPE, replace(FIT, **facts)))
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_cpu_features_that_cannot_be_given_are_named_sorted():
    shape = replace(SHAPE, cpu_features=("sse2", "avx512f", "aes"))
    facts = replace(FIT, cpu_features=frozenset({"sse2"}), qemu_version="10.1.0")
    assert lines(destination_blockers(SANDBOX, shape, facts)) == [
        (
            "machine.cpu: the guest has CPU features that this host cannot give: aes, avx512f; choose another host, or start "
            "the sandbox with a CPU model without them"
        )
    ]
    assert (
        destination_blockers(SANDBOX, shape, replace(facts, cpu_features=frozenset(shape.cpu_features))) == []
    )


def test_a_named_cpu_model_is_the_same_in_every_release():
    assert (
        destination_blockers(SANDBOX, replace(SHAPE, cpu_model="qemu64"), replace(FIT, qemu_version="10.1.0"))
        == []
    )


def test_everything_that_is_wrong_is_named_at_once_and_sorted():
    facts = DestinationFacts(
        qemu_version="7.2.22",
        accelerator="kvm",
        machine_types=frozenset(),
        memory_free_bytes=0,
        disks={},
        addresses={"net0": ()},
    )
    subjects = [blocker.subject for blocker in destination_blockers(SANDBOX, SHAPE, facts)]
    assert subjects == [
        "device.disk0",
        "host.memory",
        "machine.accelerator",
        "machine.cpu",
        "machine.type",
        "network.net0",
        "qemu.version",
    ]


T0_US = 1_750_000_000_000_000


@pytest.mark.parametrize("ahead_s", [-1.0, 0.0, 30.0, 61.0])
def test_clocks_that_may_agree_are_not_warned_of(ahead_s):
    assert preflight.clock_warnings(T0_US, replace(FIT, now_us=T0_US + int(ahead_s * 1e6))) == []


def test_clocks_that_differ_are_a_warning_and_no_blocker():
    behind = preflight.clock_warnings(T0_US, replace(FIT, now_us=T0_US - 5_000_000))
    assert behind == ["this host's clock is at least 5.0 s behind the source's: set both by NTP"]
    ahead = preflight.clock_warnings(T0_US, replace(FIT, now_us=T0_US + 3_600_000_000))
    assert ahead[0].startswith(
        "the saved state is 3600 s old by this host's clock: it was carried for long, or the"
    )


def test_clocks_that_are_not_known_are_not_compared():
    assert preflight.clock_warnings(0, replace(FIT, now_us=T0_US)) == []
    assert preflight.clock_warnings(T0_US, FIT) == []
