"""How far each stream of a container's process has gone on this host, in a file that outlives a killed shim.

The file is mapped into memory: a number is there for the next shim as soon as it is set, without a system call, whatever
happens to this one. It lies in RUN_DIR and need not survive the host: nor does the VM. A shim that is killed between a
write to a fifo and the store that follows it, some microseconds, repeats the bytes of that one write.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

from sandshift.errors import Unavailable

STDIN: Final = 0
FLAGS: Final = 3
SLOTS: Final = 4
FILE_BYTES: Final = 8 * SLOTS
INPUT_CLOSED: Final = 1
"""Flag: CloseIO was called."""
INPUT_ASK: Final = 2
"""Flag: where stdin begins here only the agent knows; it is asked first."""
BEGUN: Final = 4
"""Flag: the process came from elsewhere, and where its streams begin here was set."""


class Offsets:
    """Of one process: offsets of the first byte of stdin that the agent has not taken, and of stdout and stderr that the
    caller was not given."""

    def __init__(self, folder: Path, process_id: str) -> None:
        """Map the file, made with zeros if there is none. Raises Unavailable, naming it."""
        self.path = folder / process_id
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, FILE_BYTES)
                self._map = mmap.mmap(descriptor, FILE_BYTES)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise Unavailable(f"{self.path} cannot be used: {error.strerror}") from error
        self._numbers = memoryview(self._map).cast("Q")

    def __getitem__(self, stream: int) -> int:
        return self._numbers[stream]

    def __setitem__(self, stream: int, offset: int) -> None:
        self._numbers[stream] = offset

    def has(self, flag: int) -> bool:
        return bool(self._numbers[FLAGS] & flag)

    def set_flag(self, flag: int, *, on: bool = True) -> None:
        self._numbers[FLAGS] = self._numbers[FLAGS] | flag if on else self._numbers[FLAGS] & ~flag

    def clear(self) -> None:
        for slot in range(SLOTS):
            self._numbers[slot] = 0

    def close(self) -> None:
        """Let go of the file, which stays. Idempotent."""
        self._numbers.release()
        self._map.close()

    def remove(self) -> None:
        """The process is forgotten. Idempotent."""
        self.close()
        self.path.unlink(missing_ok=True)
