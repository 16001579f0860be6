"""The guest's own system: what is read of it for Info, and what a start or a move changes in it.

Everything that touches the machine as a whole goes through here, so that tests can put another System in its place.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sandshift.agent import netlink

_RNDADDENTROPY: Final = 0x40085203
_RNDRESEEDCRNG: Final = 0x5207
_GENERATION_ID: Final = "sys/firmware/qemu_fw_cfg/by_name/etc/vmgenid_guid/raw"
_GENERATION_ID_PLACE: Final = slice(40, 56)
"""Source: QEMU hw/acpi/vmgenid.c, VMGENID_GUID_OFFSET."""


class System:
    """Calls block for microseconds. `root`: where /etc, /proc and /sys are looked for."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def boot_id(self) -> str:
        """The kernel's boot id. The kernel makes it when it is first asked for: see `Agent.Personalize`."""
        return self._read("proc/sys/kernel/random/boot_id")

    def machine_id(self) -> str:
        return self._read("etc/machine-id")

    def hostname(self) -> str:
        return socket.gethostname()

    def memory_total_bytes(self) -> int:
        for line in self._read("proc/meminfo").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
        return 0

    def generation_id(self) -> str:
        """The VM's generation id as its firmware tells it; empty: there is none, or the kernel cannot show it."""
        try:
            raw = (self._root / _GENERATION_ID).read_bytes()[_GENERATION_ID_PLACE]
            first, second, third, rest = struct.unpack("<IHH8s", raw)
        except (OSError, struct.error):
            return ""
        return f"{first:08x}-{second:04x}-{third:04x}-{rest[:2].hex()}-{rest[2:].hex()}"

    def add_entropy(self, entropy: bytes) -> None:
        """Mix `entropy` into the kernel's pool, count it, and reseed from the pool at once."""
        pool = struct.pack(f"=ii{len(entropy)}s", 8 * len(entropy), len(entropy), entropy)
        with open("/dev/urandom", "rb", buffering=0) as device:  # noqa: PTH123
            fcntl.ioctl(device, _RNDADDENTROPY, pool)
            fcntl.ioctl(device, _RNDRESEEDCRNG)

    def realtime_ns(self) -> int:
        return time.time_ns()

    def set_realtime_ns(self, realtime_ns: int) -> None:
        time.clock_settime_ns(time.CLOCK_REALTIME, realtime_ns)

    def set_machine_id(self, machine_id: str) -> None:
        self._write("etc/machine-id", machine_id + "\n")

    def set_hostname(self, hostname: str) -> None:
        socket.sethostname(hostname)
        self._write("etc/hostname", hostname + "\n")
        self._write("etc/hosts", f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {hostname}\n")

    def set_nameservers(self, nameservers: Sequence[str]) -> None:
        self._write("etc/resolv.conf", "".join(f"nameserver {server}\n" for server in nameservers))

    def card_index(self, place: int) -> int:
        """The interface index of the `place`-th network card, in the order of their PCI addresses.

        Raises:
            LookupError: there are not so many.
        """
        cards = sorted(
            (str(folder.resolve()), (folder.parent / "ifindex").read_text())
            for folder in (self._root / "sys/class/net").glob("*/device")
        )
        if place >= len(cards):
            raise LookupError(f"network card {place}: the machine has {len(cards)}")
        return int(cards[place][1])

    def apply_network(self, messages: Sequence[bytes]) -> None:
        netlink.apply(messages)

    def power_off(self) -> None:
        """Write everything out and switch the machine off. Returns, and a moment later there is nobody to return to."""
        os.sync()
        subprocess.Popen(["/bin/busybox", "poweroff", "-f"])

    def _read(self, place: str) -> str:
        try:
            return (self._root / place).read_text().strip()
        except OSError:
            return ""

    def _write(self, place: str, text: str) -> None:
        (self._root / place).write_text(text)
