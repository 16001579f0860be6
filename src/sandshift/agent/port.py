"""Finding and opening the virtio-serial port that the host listens on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

PORT_NAME: Final = "sandshift.agent"
APPEARS_S: Final = 20.0
"""Ports appear some time after their driver."""
_LOOK_S: Final = 0.005


class NoPort(Exception):
    """The machine has no such port."""


def find(root: Path = Path("/")) -> Path | None:
    """The device of the port, if it is there by now. There is no udev, so its link does not exist."""
    for named in (root / "sys/class/virtio-ports").glob("*/name"):
        if named.read_text().strip() == PORT_NAME:
            return root / "dev" / named.parent.name
    return None


def open_port() -> int:
    """A non-blocking descriptor of the port. It can be opened only once, so it is never closed.

    Blocks until the port appears. Raises NoPort after APPEARS_S.
    """
    deadline_s = time.monotonic() + APPEARS_S
    while time.monotonic() < deadline_s:
        if (device := find()) is not None:
            try:
                return os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                pass  # named, and its node not made yet
        time.sleep(_LOOK_S)
    raise NoPort(f"no virtio-serial port {PORT_NAME} within {APPEARS_S:.0f} s")
