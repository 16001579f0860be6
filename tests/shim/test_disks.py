from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from sandshift.config import Config, Limits, Migration
from sandshift.errors import IllegalMove, NoRoom, Unavailable
from sandshift.rootfs.plan import DiskFile, RootfsPlan
from sandshift.sandbox.disks import DiskLayer, GuestRootfs
from sandshift.shim.sandbox import LiveSandbox
from sandshift.shim.tasks.disks import Disks
from sandshift.vmm.fake import FakeMachine, FakeVmm
from sandshift.vmm.machine import MachineSpec
from tests.vmm.specs import fresh_spec


def layer(name: str, folder: Path = Path("/images")) -> DiskFile:
    return DiskFile(folder / f"{name}.erofs", "erofs", 4096, f"sha256:{name}", read_only=True)


def writable(path: Path, *, scratch: bool = False) -> DiskFile:
    return DiskFile(path, "ext4", 1 << 20, "", read_only=False, scratch=scratch)


class Owner:
    """What Disks needs of a sandbox, with every word that is written down."""

    def __init__(self, machine: FakeMachine | None, spec: MachineSpec | None, disks_max: int = 128) -> None:
        self.sandbox_id = "s"
        self.config = Config(migration=Migration(limits=Limits(disks_max=disks_max)))
        self.machine = machine
        self.spec = spec
        self.books: list[dict[str, list[str]]] = []
        self.refuse_saving = False
        self.disks = Disks(cast(LiveSandbox, self))

    def require_machine(self) -> FakeMachine:
        assert self.machine is not None
        return self.machine

    async def save(self) -> None:
        await asyncio.sleep(0)
        if self.refuse_saving:
            raise Unavailable("the disk is full")
        self.books.append({disk.device.id: sorted(disk.holders) for disk in self.disks.all()})

    def in_the_vm(self) -> list[str]:
        assert self.machine is not None
        return [device.id for device in self.machine.shape.devices if device.size_bytes]


@pytest.fixture
async def owner(tmp_path: Path) -> Owner:
    spec = fresh_spec(tmp_path / "vm", "s", Path("/kernel"), Path("/initramfs"))
    return Owner(await FakeVmm().start(spec), spec)


async def test_a_container_gets_its_disks_and_the_guest_is_told_where_they_are(
    owner: Owner, tmp_path: Path
) -> None:
    plan = RootfsPlan((layer("top"), layer("bottom")), writable(tmp_path / "rw"), read_only=False)
    plugged = await owner.disks.plug("c1", plan, [layer("folder")])
    assert plugged.layers == ("disk1", "disk2")
    assert (plugged.writable, plugged.mounts) == ("disk3", ("disk4",))
    assert plugged.rootfs == GuestRootfs(
        layers=(DiskLayer(1, "erofs"), DiskLayer(2, "erofs")), writable=DiskLayer(3, "ext4")
    )
    assert plugged.mount_layers == (DiskLayer(4, "erofs"),)
    assert owner.in_the_vm() == ["disk1", "disk2", "disk3", "disk4"]
    devices = {device.id: device for device in owner.require_machine().shape.devices}
    assert (devices["disk1"].content_digest, devices["disk1"].read_only) == ("sha256:top", True)
    assert (devices["disk3"].content_digest, devices["disk3"].read_only) == ("", False)


async def test_the_description_of_the_machine_is_that_of_the_vm(owner: Owner) -> None:
    await owner.disks.plug("c1", RootfsPlan((layer("a"),)))
    assert owner.spec is not None
    assert owner.spec.shape == owner.require_machine().shape
    assert owner.spec.disks == owner.disks.sources()
    await owner.disks.release("c1")
    assert owner.spec.shape == owner.require_machine().shape
    assert owner.spec.disks == ()


async def test_one_content_is_one_disk_until_its_last_user_goes(owner: Owner) -> None:
    one = await owner.disks.plug("c1", RootfsPlan((layer("a"), layer("b"))))
    other = await owner.disks.plug("c2", RootfsPlan((layer("a", Path("/elsewhere")),)))
    assert one.layers == ("disk1", "disk2")
    assert other.layers == ("disk1",)
    await owner.disks.release("c1")
    assert owner.in_the_vm() == ["disk1"]
    await owner.disks.release("c1")
    await owner.disks.release("c2")
    assert owner.in_the_vm() == []
    assert owner.books[-1] == {}


async def test_writable_disks_are_never_shared(owner: Owner, tmp_path: Path) -> None:
    await owner.disks.attach("c1", writable(tmp_path / "a"))
    await owner.disks.attach("c2", writable(tmp_path / "b"))
    assert owner.in_the_vm() == ["disk1", "disk2"]


async def test_a_place_that_is_free_again_is_used_again(owner: Owner) -> None:
    for name in "abc":
        await owner.disks.attach(f"c-{name}", layer(name))
    await owner.disks.release("c-b")
    assert (await owner.disks.attach("c-d", layer("d"))).lun == 2


async def test_a_disk_is_in_the_books_before_the_vm_has_it_and_leaves_them_after(owner: Owner) -> None:
    machine = owner.require_machine()
    attach, detach, seen = machine.attach_disk, machine.detach_disk, []

    async def attach_and_look(device, source):
        seen.append(("in", dict(owner.books[-1])))
        await attach(device, source)

    async def detach_and_look(device_id):
        seen.append(("out", dict(owner.books[-1])))
        await detach(device_id)

    machine.attach_disk, machine.detach_disk = attach_and_look, detach_and_look  # type: ignore[method-assign]
    await owner.disks.attach("c1", layer("a"))
    await owner.disks.release("c1")
    assert seen == [("in", {"disk1": ["c1"]}), ("out", {"disk1": ["c1"]})]


async def test_more_disks_than_are_allowed_are_refused_with_the_number_and_leave_nothing(
    tmp_path: Path,
) -> None:
    spec = fresh_spec(tmp_path / "vm", "s", Path("/kernel"), Path("/initramfs"))
    owner = Owner(await FakeVmm().start(spec), spec)
    for number in range(127):
        await owner.disks.attach("c1", layer(str(number)))
    shared = RootfsPlan((layer("0"), layer("more"), layer("too many")))
    with pytest.raises(NoRoom, match="sandbox s has 128 disks: at most that many are allowed"):
        await owner.disks.plug("c2", shared)
    assert len(owner.in_the_vm()) == 127
    assert {tuple(disk.holders) for disk in owner.disks.all()} == {("c1",)}
    await owner.disks.plug("c2", RootfsPlan((layer("0"), layer("last"))))
    assert len(owner.in_the_vm()) == 128


async def test_a_disk_that_the_vm_refuses_leaves_nothing(owner: Owner, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.write_text("")
    machine = owner.require_machine()

    async def refuse(device, source):
        raise IllegalMove("sandbox s: QEMU refused to open disk")

    machine.attach_disk = refuse  # type: ignore[method-assign]
    with pytest.raises(IllegalMove, match="refused to open"):
        await owner.disks.plug("c1", RootfsPlan((), writable(scratch, scratch=True)))
    assert owner.disks.all() == []
    assert owner.spec is not None
    assert owner.spec.shape == machine.shape
    assert not scratch.exists()


async def test_a_disk_that_cannot_be_written_down_is_not_plugged_in(owner: Owner) -> None:
    owner.refuse_saving = True
    with pytest.raises(Unavailable, match="the disk is full"):
        await owner.disks.plug("c1", RootfsPlan((layer("a"),)))
    assert owner.in_the_vm() == []
    assert owner.disks.all() == []


async def test_a_scratch_disk_goes_with_its_container_and_others_stay(owner: Owner, tmp_path: Path) -> None:
    for name in ("scratch", "given"):
        (tmp_path / name).write_text("")
    await owner.disks.attach("c1", writable(tmp_path / "scratch", scratch=True))
    await owner.disks.attach("c1", writable(tmp_path / "given"))
    await owner.disks.release("c1")
    assert not (tmp_path / "scratch").exists()
    assert (tmp_path / "given").exists()


async def test_a_caller_that_goes_away_leaves_no_disk_half_plugged_in(owner: Owner) -> None:
    machine = owner.require_machine()
    attach, plugging, go_on = machine.attach_disk, asyncio.Event(), asyncio.Event()

    async def slow(device, source):
        plugging.set()
        await go_on.wait()
        await attach(device, source)

    machine.attach_disk = slow  # type: ignore[method-assign]
    calling = asyncio.create_task(owner.disks.plug("c1", RootfsPlan((layer("a"), layer("b")))))
    await plugging.wait()
    calling.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await owner.disks.release("c1")
    assert owner.in_the_vm() == []


async def test_what_the_guest_holds_on_to_stays_and_the_rest_goes(owner: Owner) -> None:
    machine = owner.require_machine()
    detach = machine.detach_disk

    async def refuse_first(device_id):
        if device_id == "disk1":
            raise IllegalMove("sandbox s: QEMU refused to take out disk1")
        await detach(device_id)

    machine.detach_disk = refuse_first  # type: ignore[method-assign]
    await owner.disks.plug("c1", RootfsPlan((layer("a"), layer("b"))))
    with pytest.raises(IllegalMove, match="take out disk1"):
        await owner.disks.release("c1")
    assert owner.in_the_vm() == ["disk1"]
    machine.detach_disk = detach  # type: ignore[method-assign]
    await owner.disks.keep_only([])
    assert owner.in_the_vm() == []


async def test_a_later_shim_knows_every_disk_and_drops_those_of_nobody(owner: Owner, tmp_path: Path) -> None:
    await owner.disks.plug("c1", RootfsPlan((layer("a"),), writable(tmp_path / "rw", scratch=True)))
    await owner.disks.plug("c2", RootfsPlan((layer("a"), layer("b"))))
    later = Owner(owner.machine, owner.spec)
    later.disks.restore(owner.disks.as_document())
    assert [(disk.lun, disk.file, disk.holders) for disk in later.disks.all()] == [
        (disk.lun, disk.file, disk.holders) for disk in owner.disks.all()
    ]
    await later.disks.keep_only(["c1"])
    assert later.in_the_vm() == ["disk1", "disk2"]
    with pytest.raises(KeyError):
        later.disks.restore([{"lun": 1}])


async def test_the_disks_of_a_sandbox_that_comes_are_part_of_its_vm(owner: Owner, tmp_path: Path) -> None:
    there = Owner(None, None)
    await owner.disks.plug("c1", RootfsPlan((layer("a"), layer("b"))))
    here = {"disk1": layer("a", tmp_path), "disk2": layer("b", tmp_path)}
    there.disks.expect("c1", here)
    there.disks.expect("c1", here)
    assert {source.device_id: source.path for source in there.disks.sources()} == {
        name: file.path for name, file in here.items()
    }
    assert [disk.device for disk in there.disks.all()] == [disk.device for disk in owner.disks.all()]
    there.disks.forget()
    assert there.disks.all() == []


async def test_when_the_vm_is_gone_its_scratch_disks_are_too(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("")
    await owner.disks.attach("c1", writable(tmp_path / "scratch", scratch=True))
    await owner.require_machine().destroy()
    await owner.disks.release("c1")
    assert not (tmp_path / "scratch").exists()
