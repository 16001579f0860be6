"""The initramfs: busybox, the modules, and the script that finds the root, mounts it and becomes the agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sandshift.image import cpio
from sandshift.image.modules import Module

AGENT_START: Final = "/opt/sandshift/start.py"
ROOT_LUN: Final = "0:0:0"
"""Channel, target and LUN of the root on its virtio-scsi controller, where the command line names no other."""
ROOT_WAIT_S: Final = 20

_COMMANDS: Final = ("mkdir", "modprobe", "mount", "poweroff", "sh", "switch_root", "sync", "usleep")
"""What the script runs of busybox: as links, because /proc, which its own look-up needs, is not there at first."""

_INIT: Final = """#!/bin/busybox sh
# Process 1 of the guest until the agent takes over. Everything it says goes to the serial console.
export PATH=/bin
fail() { echo "sandshift initramfs: $1"; sync; poweroff -f; }
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
modprobe -a @MODULES@ || fail "a kernel module does not load"

lun=@ROOT_LUN@
read -r words < /proc/cmdline
for word in $words; do
    case "$word" in sandshift.root=*) lun="${word#sandshift.root=}" ;; esac
done
tries=0
until set -- /sys/bus/scsi/devices/*:"$lun"/block/* && [ -e "$1" ] && [ -b "/dev/${1##*/}" ]; do
    tries=$((tries + 1))
    [ "$tries" -lt @TRIES@ ] || fail "no disk at $lun within @WAIT_S@ s"
    usleep 10000
done
mount -t erofs -o ro "/dev/${1##*/}" /lower || fail "the root ${1##*/} is no erofs image that this kernel reads"
mount -t tmpfs -o mode=0755,size=50% tmpfs /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root || fail "no overlay"
mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
mkdir /root/dev/pts /root/dev/shm
mount -t devpts -o mode=0620,ptmxmode=0666,gid=5 devpts /root/dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev shm /root/dev/shm
mount -t tmpfs -o mode=0755,nosuid,nodev run /root/run
mount -t tmpfs -o mode=1777,nosuid,nodev tmp /root/tmp
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /root/sys/fs/cgroup
# The agent moves large buffers: without this each one is mapped, faulted in page by page and unmapped again.
export MALLOC_MMAP_THRESHOLD_=8388608 MALLOC_TRIM_THRESHOLD_=33554432 MALLOC_TOP_PAD_=1048576
exec switch_root /root @AGENT@
fail "the agent does not start"
"""


def build(busybox: bytes, modules: Sequence[Module], release: str, agent: Sequence[str]) -> bytes:
    """The archive. `agent`: the command that process 1 becomes. Pure: the same inputs give the same bytes."""
    where = f"lib/modules/{release}"
    entries = [
        cpio.executable("bin/busybox", busybox),
        *(cpio.link(f"bin/{name}", "busybox") for name in _COMMANDS),
        cpio.executable("init", _script(modules, agent).encode()),
        cpio.plain(f"{where}/modules.dep", _dependencies(modules).encode()),
        *(cpio.folder(name) for name in ("dev", "proc", "sys", "root", "lower", "upper")),
        *(cpio.plain(f"{where}/{module.name}.ko", module.content) for module in modules),
    ]
    return cpio.archive(entries)


def _script(modules: Sequence[Module], agent: Sequence[str]) -> str:
    values = {
        "@MODULES@": " ".join(module.name for module in modules),
        "@ROOT_LUN@": ROOT_LUN,
        "@TRIES@": str(ROOT_WAIT_S * 100),
        "@WAIT_S@": str(ROOT_WAIT_S),
        "@AGENT@": " ".join(agent),
    }
    text = _INIT
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text


def _dependencies(modules: Sequence[Module]) -> str:
    """modules.dep as modprobe reads it: all that a module needs, the last to load first."""
    direct = {module.name: module.needs for module in modules}

    def all_needs(name: str) -> list[str]:
        found: list[str] = []
        for needed in direct.get(name, ()):
            found += [needed, *all_needs(needed)]
        return list(dict.fromkeys(found))

    return "".join(
        f"{name}.ko:{''.join(f' {needed}.ko' for needed in all_needs(name) if needed in direct)}\n"
        for name in direct
    )
