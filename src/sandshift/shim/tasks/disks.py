"""The disks that a sandbox's containers are on: plugged in while the VM runs, shared by content, taken out with the last user.

What is written down is never less than what the VM has: a disk is in the books before it is plugged in, and leaves them
after it is out. So a shim that starts again knows every disk, and `keep_only` drops those that never came to be.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sandshift.errors import NoRoom, SandshiftError
from sandshift.rootfs.plan import DiskFile, RootfsPlan
from sandshift.sandbox.disks import DiskLayer, GuestRootfs
from sandshift.vmm.machine import DiskSource, MachineSpec
from sandshift.vmm.standard import DISKS_MAX, DiskPlan, disk_device, with_disk, without_disk

if TYPE_CHECKING:
    from sandshift.sandbox.shape import Device
    from sandshift.shim.sandbox import LiveSandbox

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PLACE: Final = 1
"""Place 0 is the guest's own root."""


@dataclass(slots=True)
class PluggedDisk:
    """A disk of the VM, the file behind it, and the containers (by guest id) that use it."""

    lun: int
    file: DiskFile
    holders: set[str] = field(default_factory=set)

    @property
    def device(self) -> Device:
        plan = DiskPlan(self.file.size_bytes, self.file.digest, read_only=self.file.read_only)
        return disk_device(self.lun, plan)

    @property
    def layer(self) -> DiskLayer:
        """As the guest is told of it."""
        return DiskLayer(self.lun, self.file.file_system)


@dataclass(frozen=True, slots=True)
class Plugged:
    """The disks of one container, as the model and as the guest know them."""

    layers: tuple[str, ...]
    """Device ids, the topmost first."""
    writable: str
    """Device id; empty: guest memory."""
    mounts: tuple[str, ...]
    """Device ids of the folders, in the order in which they were given."""
    rootfs: GuestRootfs
    mount_layers: tuple[DiskLayer, ...]


class Disks:
    """One per sandbox. Calls are served one after another, and once begun are not interrupted: `release` undoes them.

    Methods raise errors of `sandshift.errors`: Unavailable and IllegalMove with the VM's own words.
    """

    def __init__(self, sandbox: LiveSandbox) -> None:
        self._sandbox = sandbox
        self._disks: dict[str, PluggedDisk] = {}
        self._turn = asyncio.Lock()

    def all(self) -> list[PluggedDisk]:
        return list(self._disks.values())

    def sources(self) -> tuple[DiskSource, ...]:
        """Where the disks of the VM lie on this host, for its description."""
        return tuple(DiskSource(name, disk.file.path) for name, disk in self._disks.items())

    async def plug(self, holder: str, plan: RootfsPlan, folders: Sequence[DiskFile] = ()) -> Plugged:
        """Plug in what container `holder` (its guest id) needs and the VM does not have yet. All or nothing.

        Raises:
            NoRoom: the sandbox has as many disks as it may.
        """
        disks = []
        try:
            for file in (*plan.disks, *folders):
                disks.append(await self.attach(holder, file))  # noqa: PERF401 - one after another
        except BaseException:
            await asyncio.shield(self.release(holder))
            raise
        return describe(plan, disks)

    async def attach(self, holder: str, file: DiskFile) -> PluggedDisk:
        """One disk, shared with those that have the same content. The guest sees a new one some 100 ms later."""
        return await self._in_turn(lambda: self._attach(holder, file))

    async def detach(self, holder: str, device_id: str) -> None:
        """One disk of `holder`'s. It is taken out if nobody else uses it: the guest must have let go of it. Idempotent."""
        await self._in_turn(lambda: self._detach(holder, (device_id,)))

    async def release(self, holder: str) -> None:
        """Every disk of `holder`'s, likewise."""
        await self._in_turn(lambda: self._detach(holder, tuple(self._disks)))

    async def keep_only(self, holders: Collection[str]) -> None:
        """Take out all that none of `holders` uses: after a restart, what an earlier shim did not come to take out."""
        for disk in self.all():
            disk.holders &= set(holders)
        await self.release("")

    async def _in_turn(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async def run() -> T:
            async with self._turn:
                return await work()

        return await asyncio.shield(run())

    async def _attach(self, holder: str, file: DiskFile) -> PluggedDisk:
        disk = next((one for one in self.all() if file.digest and one.file.digest == file.digest), None)
        if disk is not None:
            disk.holders.add(holder)
            await self._sandbox.save()
            return disk
        machine = self._sandbox.require_machine()
        disk = PluggedDisk(self._free_place(), file, {holder})
        source = DiskSource(disk.device.id, file.path)
        self._note(disk)
        try:
            await self._sandbox.save()
            await machine.attach_disk(disk.device, source)
        except BaseException:
            self._strike(disk.device.id)
            raise
        return disk

    def _free_place(self) -> int:
        sandbox = self._sandbox
        most = min(sandbox.config.migration.limits.disks_max, DISKS_MAX - FIRST_PLACE)
        if len(self._disks) >= most:
            raise NoRoom(
                f"sandbox {sandbox.sandbox_id} has {most} disks: at most that many are allowed "
                "(migration.limits.disks_max); put fewer containers, layers or folders into it"
            )
        taken = {disk.lun for disk in self._disks.values()}
        return next(place for place in range(FIRST_PLACE, DISKS_MAX) if place not in taken)

    def _note(self, disk: PluggedDisk) -> None:
        device = disk.device
        self._disks[device.id] = disk
        self._describe(lambda spec: with_disk(spec, device, DiskSource(device.id, disk.file.path)))

    def _strike(self, device_id: str) -> None:
        disk = self._disks.pop(device_id)
        self._describe(lambda spec: without_disk(spec, device_id))
        if disk.file.scratch:
            disk.file.path.unlink(missing_ok=True)

    def _describe(self, change: Callable[[MachineSpec], MachineSpec]) -> None:
        if self._sandbox.spec is not None:
            self._sandbox.spec = change(self._sandbox.spec)

    async def _detach(self, holder: str, device_ids: Iterable[str]) -> None:
        problems: list[SandshiftError] = []
        changed = False
        for device_id in device_ids:
            if (disk := self._disks.get(device_id)) is None:
                continue
            changed |= holder in disk.holders
            disk.holders.discard(holder)
            if disk.holders:
                continue
            try:
                await self._take_out(device_id)
                changed = True
            except SandshiftError as error:
                log.warning("disk %s stays in: %s", device_id, error)
                problems.append(error)
        if changed:
            await self._sandbox.save()
        if problems:
            raise problems[0]

    async def _take_out(self, device_id: str) -> None:
        machine = self._sandbox.machine
        if machine is not None and machine.alive:
            await machine.detach_disk(device_id)
        self._strike(device_id)

    # A sandbox that comes from elsewhere, or ends

    def expect(self, holder: str, files: Mapping[str, DiskFile]) -> None:
        """A container that comes from elsewhere has its disks here: device id -> file (see disk_matching.py). They are
        part of the VM that is made for it. Idempotent."""
        for device_id, file in files.items():
            lun = int(device_id.removeprefix("disk"))
            self._disks.setdefault(device_id, PluggedDisk(lun, file)).holders.add(holder)

    def forget(self) -> None:
        """The VM is gone, and its disks with it: what was made for it alone is removed."""
        for device_id in list(self._disks):
            self._strike(device_id)

    # For a later shim

    def as_document(self) -> list[dict[str, object]]:
        return [
            {
                "lun": disk.lun,
                "path": str(disk.file.path),
                "file_system": disk.file.file_system,
                "size_bytes": disk.file.size_bytes,
                "digest": disk.file.digest,
                "read_only": disk.file.read_only,
                "scratch": disk.file.scratch,
                "holders": sorted(disk.holders),
            }
            for disk in self._disks.values()
        ]

    def restore(self, document: Sequence[Mapping[str, Any]]) -> None:
        """What `as_document` gave. Raises KeyError, TypeError or ValueError for anything else."""
        for entry in document:
            file = DiskFile(
                path=Path(entry["path"]),
                file_system=str(entry["file_system"]),
                size_bytes=int(entry["size_bytes"]),
                digest=str(entry["digest"]),
                read_only=bool(entry["read_only"]),
                scratch=bool(entry["scratch"]),
            )
            disk = PluggedDisk(int(entry["lun"]), file, set(entry["holders"]))
            self._disks[disk.device.id] = disk


def describe(plan: RootfsPlan, disks: Sequence[PluggedDisk]) -> Plugged:
    """What became of `plan` and of the folders after it, whose disks are `disks`."""
    count = len(plan.layers)
    own, folders = disks[: len(plan.disks)], disks[len(plan.disks) :]
    writable = own[count] if plan.writable is not None else None
    return Plugged(
        layers=tuple(disk.device.id for disk in own[:count]),
        writable=writable.device.id if writable is not None else "",
        mounts=tuple(disk.device.id for disk in folders),
        rootfs=GuestRootfs(
            layers=tuple(disk.layer for disk in own[:count]),
            writable=writable.layer if writable is not None else None,
            read_only=plan.read_only,
        ),
        mount_layers=tuple(disk.layer for disk in folders),
    )
