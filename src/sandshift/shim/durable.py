"""Writing to disk so that it is there after a crash: records first, answers later.

fsync never runs on the event loop: one thread per shim does all of it, so records reach the disk in the order in which
they were given.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from sandshift.errors import Unavailable

FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700
UNKNOWN_SIZE: Final = -1

T = TypeVar("T")


def make_folder(path: Path) -> Path:
    """Make `path` and its parents, each durable and readable by the owner only. Raises Unavailable with the reason."""
    try:
        for folder in (*reversed(path.parents), path):
            if not folder.is_dir():  # mkdir(parents=True) would leave the parents to the umask.
                folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
                # Else a crash of the host takes the folder, with all that was synced in it.
                sync_folder(folder.parent)
    except OSError as error:
        raise Unavailable(f"{path} cannot be made: {error.strerror}") from error
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` with `data`, so that a reader or a crash sees the old content or the new, never a part. Blocks."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Unavailable(
            f"{path} cannot be written: {error.strerror}; free space or mend the disk, then repeat"
        ) from error


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class AppendOnlyFile:
    """A file that only grows. A record that could not be written whole is cut off again, so none is ever torn twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
            self._size = os.fstat(self._descriptor).st_size
            sync_folder(path.parent)
        except OSError as error:
            raise Unavailable(f"{path} cannot be opened: {error.strerror}") from error

    @property
    def size_bytes(self) -> int:
        """UNKNOWN_SIZE after a write that failed and could not be cut off again: `truncate` it."""
        return self._size

    def append(self, data: bytes, *, sync: bool = True) -> None:
        """Write `data`; with `sync` wait until the disk has it, else it survives this process but not the host.

        Blocks. Raises Unavailable; then nothing of it is in the file.
        """
        try:
            _write_all(self._descriptor, data)
            if sync:
                os.fdatasync(self._descriptor)
        except OSError as error:
            self._cut_back()
            raise Unavailable(
                f"{self.path} cannot be written: {error.strerror}; nothing was done. Free space or mend the disk, then repeat"
            ) from error
        self._size += len(data)

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError:
            self._size = UNKNOWN_SIZE

    def truncate(self, size_bytes: int) -> None:
        """Cut a torn tail off. Blocks."""
        os.ftruncate(self._descriptor, size_bytes)
        os.fsync(self._descriptor)
        self._size = size_bytes

    def close(self) -> None:
        os.close(self._descriptor)


class Disk:
    """The one thread in which a shim's blocking writes happen, in order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")

    def soon(self, action: Callable[[], object], on_error: Callable[[BaseException], None]) -> None:
        """Run `action` after all that was given before, and wait for nothing; `on_error` is called in that thread."""

        def run() -> None:
            try:
                action()
            except BaseException as error:  # noqa: BLE001 - handed on
                on_error(error)

        self._thread.submit(run)

    async def run(self, action: Callable[[], T]) -> T:
        """Run `action` after all that was given before. Not interrupted when the caller is cancelled: it will have happened.

        Raises what `action` does, OSError as Unavailable.
        """
        try:
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, action))
        except OSError as error:
            raise Unavailable(
                f"{error.filename or 'the disk'}: {error.strerror}; mend it, then repeat"
            ) from error

    def close(self) -> None:
        self._thread.shutdown(wait=True)
