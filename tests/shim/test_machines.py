"""Which machines a host makes: from its configuration, its images and its QEMU, which here are given."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from sandshift.config import Config, Places, Vm
from sandshift.errors import NotFound, Rejected, Unavailable
from sandshift.guest import warmth
from sandshift.image.store import Description, GuestImage
from sandshift.sandbox.model import NetworkCard, Sandbox
from sandshift.sandbox.shape import is_card
from sandshift.shim import machines
from sandshift.shim.machines import BOOT_S, MIB, HostMachines, free_memory_bytes, nobodys
from sandshift.shim.parts import Wish
from sandshift.vmm.fake import FakeVmm, FakeWorld
from sandshift.vmm.hypervisor import CpuModel, Hypervisor
from tests.shim.fake_agent import FakeGuest
from tests.shim.house import FakeTaps

HERE = Hypervisor(
    version="10.0.2",
    accelerator="tcg",
    machine_types=("pc-q35-10.0", "pc-q35-9.2"),
    cpu_models=(CpuModel("max"), CpuModel("Nehalem-v1", "Nehalem")),
    cpu_model="max",
    cpu_features=("aes",),
    cpu_features_most=("aes", "avx"),
    drivers=("virtio-net-pci",),
)
MODEL = Sandbox("box", network_cards=(NetworkCard("net0", mac="52:54:00:11:22:33"),))


def image(folder: Path, name: str, digit: str) -> GuestImage:
    description = Description(
        recipe=name,
        own_digest="own",
        builder="builder",
        distribution="debian 12",
        kernel_release="6.1",
        kernel_command_line="quiet",
        kernel_sha256=digit * 64,
        initramfs_sha256="2" * 64,
        root_sha256=digit * 64,
        root_bytes=4096,
        python="3.11",
        agent_version="0",
        packages=(),
    )
    return GuestImage(folder / "images" / name, description)


class Rig:
    """A host with two images, the newer one first, and no QEMU."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = [image(folder, "new", "a"), image(folder, "old", "b")]
        self.world, self.taps = FakeWorld(), FakeTaps()
        self.connected: list[float] = []
        self.config = Config(places=Places(cache_dir=str(folder)))
        monkeypatch.setattr(machines.image_build, "find", lambda _dir: next(iter(self.images), None))
        monkeypatch.setattr(machines, "published", lambda _dir: list(self.images))
        monkeypatch.setattr(machines, "survey", self._survey)
        monkeypatch.setattr(warmth, "warm_up", self._warm_up)
        self.warm = 0

    async def _survey(self, _vm: Vm, _cache: Path, kernel: Path | None) -> Hypervisor:
        assert kernel in ([image.kernel for image in self.images] or [None])
        return HERE

    async def _warm_up(self, _guest: object) -> None:
        self.warm += 1

    async def connect(self, path: Path, reply_s: float) -> FakeGuest:
        self.connected.append(reply_s)
        return FakeGuest(self.world.processes[path.parent], reply_s)

    def machines(self, **vm: object) -> HostMachines:
        config = msgspec.structs.replace(self.config, vm=Vm(**vm))  # type: ignore[arg-type]
        return HostMachines(config, FakeVmm(self.world), self.taps, self.connect)  # type: ignore[arg-type]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


async def test_a_machine_is_what_is_wished_for_else_configured_else_what_qemu_has_best(rig: Rig) -> None:
    shape, files = await rig.machines(memory_mib=300, vcpus=2).shape_for(Wish(), MODEL)
    assert (shape.memory_bytes, shape.vcpus) == (300 * MIB, 2)
    assert (shape.machine_type, shape.cpu_model, shape.qemu_version) == ("pc-q35-10.0", "max", "10.0.2")
    assert [device.mac for device in shape.devices if device.mac] == ["52:54:00:11:22:33"]
    assert (files.image, files.root) == (rig.images[0], rig.images[0].root)
    wished = Wish(memory_bytes=512 * MIB, vcpus=4)
    shape, _ = await rig.machines(machine_type="pc-q35-9.2", cpu_model="Nehalem").shape_for(wished, MODEL)
    assert (shape.memory_bytes, shape.vcpus) == (512 * MIB, 4)
    assert (shape.machine_type, shape.cpu_model) == ("pc-q35-9.2", "Nehalem")


async def test_every_machine_is_its_own(rig: Rig) -> None:
    one, other = [(await rig.machines().shape_for(Wish(), MODEL))[0] for _ in range(2)]
    assert one.uuid != other.uuid
    assert one.generation_id != other.generation_id
    assert replace(one, uuid="", generation_id="") == replace(other, uuid="", generation_id="")


async def test_without_an_image_it_is_said_how_to_make_one(rig: Rig) -> None:
    rig.images.clear()
    with pytest.raises(NotFound, match="make it with 'sandshift image build'"):
        await rig.machines().shape_for(Wish(), MODEL)


async def test_a_machine_type_that_qemu_does_not_have_is_refused_with_those_it_has(rig: Rig) -> None:
    with pytest.raises(Rejected, match=r"'pc-q35-11\.0': QEMU 10\.0\.2 has pc-q35-10\.0, pc-q35-9\.2"):
        await rig.machines(machine_type="pc-q35-11.0").shape_for(Wish(), MODEL)


async def test_an_older_image_is_found_by_the_digests_of_what_comes(rig: Rig) -> None:
    host = rig.machines()
    shape, _ = await host.shape_for(Wish(), MODEL)
    disks = tuple(
        replace(device, content_digest=rig.images[1].root_digest) if device.content_digest else device
        for device in shape.devices
    )
    old = replace(shape, devices=disks, kernel_sha256="b" * 64)
    assert (await host.files_for(old)).image == rig.images[1]
    facts = await host.facts(old)
    assert facts.disks is not None
    assert (facts.kernel_sha256, facts.disks["disk0"].content_digest) == ("b" * 64, rig.images[1].root_digest)
    with pytest.raises(NotFound, match="this host has no guest image with root sha256:aaaa"):
        await host.files_for(replace(shape, kernel_sha256="c" * 64))


async def test_what_a_host_says_of_itself_is_what_qemu_could_do_at_most(rig: Rig) -> None:
    host = rig.machines()
    facts = await host.facts((await host.shape_for(Wish(), MODEL))[0])
    assert facts.cpu_features == {"aes", "avx"}
    assert facts.cpu_models == {"max", "Nehalem", "Nehalem-v1"}
    assert facts.drivers == {"virtio-net-pci"}
    assert facts.memory_free_bytes is not None
    assert abs(facts.memory_free_bytes - free_memory_bytes()) < 4 << 30
    assert facts.now_us > 1_600_000_000_000_000


async def test_a_host_without_images_has_no_disks_to_compare(rig: Rig) -> None:
    shape, _ = await rig.machines().shape_for(Wish(), MODEL)
    rig.images.clear()
    facts = await rig.machines().facts(shape)
    assert (facts.kernel_sha256, facts.disks) == ("", {})


async def test_a_template_is_a_guest_of_nobody_s_and_is_booted_once(rig: Rig) -> None:
    host = rig.machines()
    shape, files = await host.shape_for(Wish(), MODEL)
    path = await host.template_for(shape, files)
    assert path.stat().st_size > 0
    assert (rig.connected, rig.warm) == ([BOOT_S], 1)
    (process,) = rig.world.processes.values()
    booted = process.spec.shape
    assert booted.uuid == str(uuid.UUID(int=0))
    assert {device.mac for device in booted.devices if device.mac} == {"52:54:00:00:00:00"}
    assert (process.alive, rig.taps.made) == (False, [])
    another, _ = await host.shape_for(Wish(), Sandbox("other", network_cards=MODEL.network_cards))
    assert await host.template_for(another, files) == path
    host.template_is_bad(shape, files)
    assert not path.exists()


async def test_a_template_whose_guest_does_not_answer_leaves_neither_vm_nor_tap_nor_file(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(_guest: FakeGuest) -> None:
        raise Unavailable("the guest's agent did not answer within 60 s")

    monkeypatch.setattr(FakeGuest, "info", silent)
    host = rig.machines()
    shape, files = await host.shape_for(Wish(), MODEL)
    with pytest.raises(Unavailable, match="did not answer"):
        await host.template_for(shape, files)
    assert [process.alive for process in rig.world.processes.values()] == [False]
    assert rig.taps.made == []


async def test_placeholders_stand_where_something_is_one_sandbox_s_alone(rig: Rig) -> None:
    model = Sandbox(
        "box", network_cards=tuple(NetworkCard(f"net{n}", mac=f"52:54:00:0a:0b:{n:02x}") for n in (1, 2))
    )
    shape, _ = await rig.machines().shape_for(Wish(), model)
    blank = nobodys(shape)
    assert [device.mac for device in blank.devices if is_card(device)] == [
        "52:54:00:00:00:00",
        "52:54:00:00:00:01",
    ]
    assert blank.generation_id != shape.generation_id
    assert len(blank.devices) == len(shape.devices)


def test_free_memory_is_the_kernel_s_number() -> None:
    assert 0 < free_memory_bytes() < 1 << 50
