"""Where a shim's log goes: its own file, and containerd's log while containerd listens."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FIFO: Final = "log"
"""In the bundle, which is where containerd starts a shim."""


class FifoHandler(logging.Handler):
    """Writes to containerd's fifo and never waits: what it does not take, or nobody reads any more, is in the file."""

    def __init__(self, path: str) -> None:
        """Raises OSError if nobody reads there."""
        super().__init__()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            os.write(self._descriptor, f"{self.format(record)}\n".encode())


def begin(*, debug: bool) -> None:
    """Log to standard error (the shim's file), and to containerd if it started us."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format=FORMAT)
    try:
        handler = FifoHandler(FIFO)
    except OSError:
        return
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger().addHandler(handler)
