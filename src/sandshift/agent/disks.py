"""Finding the disk that the host has plugged in: by its place on the one controller, in /sys; there is no udev."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from pathlib import Path
from typing import Final

from ttrpc import Code, StatusError

APPEARS_S: Final = 10.0
"""The guest sees a disk some 100 ms after it was plugged in; much later on a busy host."""
_LOOK_S: Final = 0.005
_DEVICES: Final = "sys/bus/scsi/devices"


def find(lun: int, root: Path = Path("/")) -> Path | None:
    """The block device of a LUN, if it is there by now."""
    for named in (root / _DEVICES).glob(f"*:0:0:{lun}/block/*"):
        device = root / "dev" / named.name
        if device.is_block_device() and _opens(device):
            return device
    return None


def _opens(device: Path) -> bool:
    """Its node is there a moment before the disk behind it is: "No such device or address", met on a busy host."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in (errno.ENXIO, errno.ENODEV)
    return True


async def wait_for(lun: int, root: Path = Path("/"), *, appears_s: float = APPEARS_S) -> str:
    """The block device of a LUN, once it is there.

    Raises:
        StatusError: NOT_FOUND: it does not appear.
    """
    deadline_s = time.monotonic() + appears_s
    while (device := find(lun, root)) is None:
        if time.monotonic() > deadline_s:
            raise StatusError(
                Code.NOT_FOUND, f"disk {lun} has not appeared in the guest within {appears_s:g} s"
            )
        await asyncio.sleep(_LOOK_S)
    return str(device)
