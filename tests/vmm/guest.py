"""A tiny guest for the tests of the VM: the distribution's cloud kernel and a busybox that obeys single words.

Built once into a cache folder. Its program answers on the agent's port: "ping" -> "pong N" with a counter kept in its
memory, "dirty MIB" rewrites that much memory over and over, "still" ends that, "id" -> its boot id.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import lzma
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

MODULES = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_console",
    "scsi_common",
    "scsi_mod",
    "virtio_scsi",
    "sd_mod",
    "failover",
    "net_failover",
    "virtio_net",
]
CACHE = Path(os.environ.get("SANDSHIFT_TEST_CACHE", "/var/cache/sandshift/test-guest"))
COMMAND_LINE = "quiet console=ttyS0 reboot=t panic=-1 mitigations=off nokaslr cryptomgr.notests audit=0 no_timer_check rdinit=/init"

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /tmp
for module in $(cat /modules/order); do insmod /modules/$module.ko; done
port=
while [ -z "$port" ]; do
  for name in /sys/class/virtio-ports/*/name; do
    [ "$(cat $name 2>/dev/null)" = sandshift.agent ] && port=/dev/$(basename $(dirname $name))
  done
done
exec 3<>$port
count=0
dirtier=
stop_dirtier() { [ -n "$dirtier" ] && kill $dirtier; dirtier=; }
while :; do
  if ! read -r word argument <&3; then sleep 0.02; continue; fi
  case $word in
    ping) count=$((count+1)); echo "pong $count" >&3 ;;
    id) cat /proc/sys/kernel/random/boot_id >&3 ;;
    disk) echo $(sha256sum /dev/$argument 2>/dev/null | cut -d' ' -f1) >&3 ;;
    card) cat /sys/class/net/$argument/address >&3 ;;
    cmdline) cat /proc/cmdline >&3 ;;
    dirty) stop_dirtier; dd if=/dev/urandom of=/tmp/pattern bs=1M count=1 2>/dev/null
      ( while :; do n=0; while [ $n -lt $argument ]; do
          dd if=/tmp/pattern of=/tmp/area bs=1M count=1 seek=$n conv=notrunc 2>/dev/null; n=$((n+1)); done; done ) &
      dirtier=$!; echo dirtying >&3 ;;
    still) stop_dirtier; echo still >&3 ;;
    off) poweroff -f ;;
    crash) echo c > /proc/sysrq-trigger ;;
  esac
done
"""


@dataclass(frozen=True)
class GuestFiles:
    kernel: Path
    initramfs: Path
    disk: Path
    """A file of 4 MiB to be given as a read-only disk."""

    @staticmethod
    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()


def missing() -> str:
    """Why the guest cannot be made here; empty: it can."""
    for program in ("apt-get", "dpkg-deb", "cpio"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return "" if _busybox() else "busybox-static is not installed"


def build() -> GuestFiles:
    """The guest's files, made unless they are there."""
    recipe = hashlib.sha256("\n".join([INIT, *MODULES]).encode()).hexdigest()[:16]
    folder = CACHE / recipe
    files = GuestFiles(folder / "vmlinuz", folder / "initramfs", folder / "disk")
    if not files.disk.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / "made"
            _make(Path(scratch), made)
            with contextlib.suppress(OSError):
                made.rename(folder)
    return files


def _make(scratch: Path, made: Path) -> None:
    made.mkdir()
    depends = _output("apt-cache", "depends", "linux-image-cloud-amd64")
    package = next(line.split()[-1] for line in depends.splitlines() if "Depends: linux-image" in line)
    subprocess.run(["apt-get", "-q", "download", package], cwd=scratch, check=True, capture_output=True)
    subprocess.run(["dpkg-deb", "-x", next(scratch.glob("*.deb")), scratch / "package"], check=True)
    shutil.copy(next((scratch / "package/boot").glob("vmlinuz-*")), made / "vmlinuz")
    _pack(scratch, made / "initramfs")
    (made / "disk").write_bytes(hashlib.shake_128(b"a disk").digest(4 << 20))


def _pack(scratch: Path, to: Path) -> None:
    root = scratch / "root"
    for folder in ("bin", "dev", "proc", "sys", "tmp", "modules"):
        (root / folder).mkdir(parents=True)
    found = {path.name.split(".")[0]: path for path in scratch.glob("package/**/lib/modules/**/*.ko*")}
    order = [module for module in MODULES if module in found]  # newer kernels have some of them built in
    for module in order:
        (root / "modules" / f"{module}.ko").write_bytes(_unpacked(found[module]))
    (root / "modules/order").write_text("\n".join(order))
    shutil.copy(_busybox(), root / "bin/busybox")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"],
        cwd=root,
        input=names.encode(),
        check=True,
        capture_output=True,
    )
    to.write_bytes(gzip.compress(archive.stdout, 1))


def _unpacked(module: Path) -> bytes:
    """Debian 12's modules are plain, Debian 13's are .xz, Ubuntu's .zst."""
    content = module.read_bytes()
    if module.suffix == ".xz":
        return lzma.decompress(content)
    if module.suffix == ".zst":
        return subprocess.run(["zstd", "-dc"], input=content, check=True, capture_output=True).stdout
    return content


def _busybox() -> str:
    return next((path for path in ("/bin/busybox", "/usr/bin/busybox") if os.access(path, os.X_OK)), "")


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Talk:
    """A conversation with the guest's program. Connect before the vCPUs start."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, path: Path) -> Talk:
        return cls(*await asyncio.open_unix_connection(path))

    async def ask(self, words: str, timeout_s: float = 30.0) -> str:
        self._writer.write(words.encode() + b"\n")
        async with asyncio.timeout(timeout_s):
            return (await self._reader.readline()).decode().strip()

    def tell(self, words: str) -> None:
        self._writer.write(words.encode() + b"\n")

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
