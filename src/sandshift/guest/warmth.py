"""Making a guest ready to make containers quickly, before it is saved as a template.

The first container of a guest costs a second of an emulated CPU, later ones a quarter: programs and libraries are read from
disk, the kernel allocates what it keeps. A container of nothing, made, entered and removed again, leaves all of that in
the memory that the template is.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from sandshift.guest.client import Guest
from sandshift.sandbox.disks import GuestRootfs
from sandshift.sandbox.model import agent_id

_ID: Final = "warm-up"
_BUSYBOX: Final = "/usr/bin/busybox"
_MEMORY_BYTES: Final = 4 << 20
_PROCESS: Final[dict[str, Any]] = {
    "args": [_BUSYBOX, "cat"],
    "cwd": "/",
    "env": ["PATH=/usr/bin"],
    "user": {"uid": 0, "gid": 0},
    "capabilities": {name: ["CAP_KILL"] for name in ("bounding", "effective", "permitted")},
    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
    "noNewPrivileges": True,
}
_SECCOMP: Final[dict[str, Any]] = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "syscalls": [{"names": ["kexec_load", "reboot"], "action": "SCMP_ACT_ERRNO"}],
}
_MOUNTS: Final = (
    ("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
    ("/dev", "tmpfs", "tmpfs", ["nosuid", "mode=755", "size=64k"]),
    (
        "/dev/pts",
        "devpts",
        "devpts",
        ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    ),
    ("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
    ("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", "ro"]),
    ("/sys/fs/cgroup", "cgroup", "cgroup", ["nosuid", "noexec", "nodev", "ro"]),
    (_BUSYBOX, "bind", _BUSYBOX, ["bind", "ro"]),
)


async def warm_up(guest: Guest) -> None:
    """Make, start, enter and remove a container of nothing. Nothing of it is left but what is warm.

    Raises what the agent answers.
    """
    spec = {
        "ociVersion": "1.0.2",
        "process": _PROCESS,
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": place, "type": kind, "source": source, "options": options}
            for place, kind, source, options in _MOUNTS
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "cgroup")],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "seccomp": _SECCOMP,
            "maskedPaths": ["/proc/kcore", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys"],
        },
    }
    rootfs = GuestRootfs(writable_bytes=_MEMORY_BYTES)
    await guest.containers.create(_ID, msgspec.json.encode(spec), rootfs, terminal=False, stdin=True)
    await guest.containers.start(_ID)
    entered = agent_id(_ID, "exec")
    await guest.start_process(
        entered, [], container_id=_ID, process_spec=msgspec.json.encode(_PROCESS), terminal=True
    )
    await guest.signal_process(agent_id(_ID), 9)
    for process_id in (entered, agent_id(_ID)):
        await guest.wait_process(process_id)
        await guest.forget_process(process_id)
    await guest.containers.delete(_ID)
