"""Containers in a real VM, for tests: a busybox root packed here, specs as containerd writes them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sandshift.errors import NotFound
from sandshift.guest.client import Guest
from sandshift.image.template import TemplateStore, key_of
from sandshift.sandbox.disks import DiskLayer, GuestMount, GuestRootfs
from sandshift.sandbox.model import agent_id
from sandshift.sandbox.oci import PodShare, guest_spec
from sandshift.sandbox.shape import Device
from sandshift.vmm.machine import DiskSource, Machine
from sandshift.vmm.qemu_machine import QemuMachine
from tests.agent.house import Sink
from tests.image import rig as rigs
from tests.image.rig import Rig

BUSYBOX = Path("/bin/busybox")
UUID = "00000000-0000-4000-8000-000000000001"
CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"]

needs_busybox = pytest.mark.skipif(not BUSYBOX.exists(), reason="busybox-static is not installed")


def make_root(folder: Path) -> Path:
    """A folder with busybox and all its commands."""
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "data"):
        (folder / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, folder / "bin/busybox")
    listed = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if name != "busybox":
            (folder / "bin" / name).symlink_to("busybox")
    (folder / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000:user:/:/bin/sh\n")
    (folder / "etc/noexec").write_text("no program\n")
    (folder / "tmp").chmod(0o1777)
    return folder


def pack_erofs(folder: Path, image: Path) -> Path:
    subprocess.run(["mkfs.erofs", "--quiet", "-T0", f"-U{UUID}", image, folder], check=True)
    return image


def pack_ext4(image: Path, size_bytes: int, folder: Path | None = None) -> Path:
    with image.open("wb") as file:
        file.truncate(size_bytes)
    command = ["/usr/sbin/mke2fs", "-q", "-t", "ext4", *(("-d", str(folder)) if folder else ()), str(image)]
    subprocess.run(command, check=True)
    return image


def disk(lun: int, path: Path, *, read_only: bool = True) -> tuple[Device, DiskSource]:
    device_id = f"disk{lun}"
    device = Device(
        id=device_id,
        driver="scsi-hd",
        bus="scsi0.0",
        address=f"0:0:{lun}",
        read_only=read_only,
        size_bytes=path.stat().st_size,
        content_digest=f"sha256:{lun:064x}" if read_only else "",
    )
    return device, DiskSource(device_id, path)


async def plug(machine: Machine, lun: int, path: Path, *, read_only: bool = True) -> None:
    device, source = disk(lun, path, read_only=read_only)
    await machine.attach_disk(device, source)


def spec(*args: str, **changes: Any) -> dict[str, Any]:
    """As `ctr run` writes it; `changes`: "process.user" and the like as process__user."""
    made: dict[str, Any] = {
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
            "apparmorProfile": "cri-containerd.apparmor.d",
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {
                "destination": "/proc",
                "type": "proc",
                "source": "proc",
                "options": ["nosuid", "noexec", "nodev"],
            },
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            },
            {
                "destination": "/dev/mqueue",
                "type": "mqueue",
                "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"],
            },
            {
                "destination": "/sys",
                "type": "sysfs",
                "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"],
            },
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "cgroupsPath": "/default/elsewhere",
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }
    for name, value in changes.items():
        place = made
        *folders, last = name.split("__")
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return made


def sh(script: str, **changes: Any) -> dict[str, Any]:
    return spec("sh", "-c", script, **changes)


@dataclass
class Ward:
    """Containers of one guest, whose root is the erofs disk at `lun`."""

    guest: Guest
    lun: int
    pod: PodShare = field(default_factory=PodShare)

    @property
    def rootfs(self) -> GuestRootfs:
        return GuestRootfs(layers=(DiskLayer(self.lun, "erofs"),))

    async def create(
        self,
        container_id: str,
        made: dict[str, Any],
        *,
        rootfs: GuestRootfs | None = None,
        mounts: Sequence[GuestMount] = (),
        terminal: bool = False,
        stdin: bool = False,
    ) -> int:
        fitted = guest_spec(made, pod=self.pod)
        return await self.guest.containers.create(
            container_id, fitted, rootfs or self.rootfs, mounts, terminal=terminal, stdin=stdin
        )

    async def run(self, container_id: str, made: dict[str, Any], **how: Any) -> int:
        pid = await self.create(container_id, made, **how)
        await self.guest.containers.start(container_id)
        return pid

    async def output(self, process_id: str, stream: int = 1) -> str:
        sink = Sink()
        await self.guest.follow_output(process_id, stream, sink.delivered, sink.take)
        return sink.data.decode()

    async def end(self, container_id: str) -> int:
        """Wait for its end and remove it with all that is known of it; its exit code."""
        code = (await self.guest.wait_process(agent_id(container_id))).code
        await self.remove(container_id)
        return code

    async def remove(self, container_id: str) -> None:
        await self.guest.containers.delete(container_id)
        for one in await self.guest.list_processes():
            if one.process_id.startswith(f"{container_id}:"):
                await self.guest.wait_process(one.process_id)
                await self.guest.forget_process(one.process_id)

    async def clear(self) -> None:
        """End and remove every container: what a test that failed has left."""
        left = {one.process_id.partition(":")[0] for one in await self.guest.list_processes()}
        for container_id in left:
            with contextlib.suppress(NotFound):
                await self.guest.containers.resume(container_id)
            await self.guest.signal_process(f"{container_id}:", 9)
            await self.guest.wait_process(f"{container_id}:")
            await self.remove(container_id)

    async def said(self, container_id: str, made: dict[str, Any], **how: Any) -> str:
        """What a container says from its start to its end with 0; nothing of it is left."""
        await self.run(container_id, made, **how)
        out, complaint = await asyncio.gather(
            self.output(agent_id(container_id)),
            self.output(agent_id(container_id), 2) if not how.get("terminal") else asyncio.sleep(0, ""),
        )
        code = await self.end(container_id)
        assert code == 0, (code, out, complaint)
        return out

    async def exec(self, container_id: str, exec_id: str, *args: str, **how: Any) -> str:
        """Start an exec session; its process id."""
        process_id = agent_id(container_id, exec_id)
        process = {
            "args": list(args),
            "cwd": how.pop("cwd", "/"),
            "env": how.pop("env", ["PATH=/bin"]),
            "user": how.pop("user", {"uid": 0, "gid": 0}),
        }
        await self.guest.start_process(
            process_id, [], container_id=container_id, process_spec=msgspec.json.encode(process), **how
        )
        return process_id


class Heard(Exception):
    """Enough was said."""


async def until_said(ward: Ward, process_id: str, word: str) -> str:
    """Read until `word` was said, and acknowledge nothing; all that was said till then."""
    heard = bytearray()

    def take(offset: int, data: bytes) -> int:
        heard[offset:] = data
        if word.encode() in heard:
            raise Heard
        return len(heard)

    async with asyncio.timeout(60):
        with contextlib.suppress(Heard):
            await ward.guest.follow_output(process_id, 1, lambda: 0, take)
    return heard.decode()


ROOT_LUN, FOLDER_LUN, SCRATCH_LUN, WHOLE_LUN, SPARE_LUN = 5, 6, 7, 8, 9


@contextlib.asynccontextmanager
async def ward_of(rig: Rig, name: str) -> AsyncIterator[tuple[QemuMachine, Ward]]:
    """A guest from a template with the disks of all these tests plugged in."""
    root = make_root(rig.folder / f"{name}-root")
    packed = rig.folder / f"{name}-packed"
    (packed / "inner").mkdir(parents=True)
    (packed / "inner/word").write_text("packed\n")
    (packed / "out").symlink_to("/etc")
    disks = {
        ROOT_LUN: pack_erofs(root, rig.folder / f"{name}-root.erofs"),
        FOLDER_LUN: pack_erofs(packed, rig.folder / f"{name}-folder.erofs"),
        SCRATCH_LUN: pack_ext4(rig.folder / f"{name}-scratch.ext4", 16 << 20),
        WHOLE_LUN: pack_ext4(rig.folder / f"{name}-whole.ext4", 32 << 20, root),
        SPARE_LUN: pack_erofs(root, rig.folder / f"{name}-spare.erofs"),
    }
    template = await TemplateStore(rigs.CACHE).ensure(
        key_of(rig.image, rigs.shape(rig.image)), rig.save_template
    )
    async with rig.clone(name, template) as (machine, guest):
        for lun, path in disks.items():
            await plug(machine, lun, path, read_only=lun not in (SCRATCH_LUN, WHOLE_LUN))
        yield machine, Ward(guest, ROOT_LUN)
