"""The VM process: started so that it outlives us, watched through a pidfd, found again by a later shim.

Linux only. A pid alone is never trusted: the record beside it holds the process's start time and the boot it belongs to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from sandshift.errors import Rejected, Unavailable
from sandshift.network_namespace import run_in_file

PID_FILE: Final = "vm.pid"
STDERR_FILE: Final = "vm.stderr"
STDERR_TAIL_BYTES: Final = 4096
LOG_KEPT_BYTES: Final = 64 << 10
KILL_S: Final = 10.0
"""How long a killed process may take to be gone: it may sit in an uninterruptible read."""
BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")
PEER_CREDENTIALS: Final = struct.Struct("3i")
"""struct ucred of SO_PEERCRED: pid, uid, gid. Source: unix(7)."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Names one process of one boot, however pids are reused."""

    pid: int
    started_ticks: int
    """Field 22 of /proc/PID/stat, clock ticks since the boot."""
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The process that has `pid` now; None if there is none."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        # The name in field 2 may hold spaces and parentheses: count from its end.
        started = int(stat.rpartition(")")[2].split()[19])
        return cls(pid=pid, started_ticks=started, boot_id=BOOT_ID_PATH.read_text().strip())


class VmProcess:
    """One process. Made by `spawn` or `adopt`, inside a running event loop."""

    def __init__(self, pid: int, pidfd: int, run_dir: Path, *, child: bool) -> None:
        self.pid = pid
        self.run_dir = run_dir
        self.ended = asyncio.Event()
        """Set when the process is gone."""
        self.returncode: int | None = None
        """Known after the end of a child; a process found again is somebody else's child. Negative: the signal."""
        self._pidfd = pidfd
        self._child = child
        asyncio.get_running_loop().add_reader(pidfd, self._on_end)

    @property
    def alive(self) -> bool:
        """Whether the process exists and is not a zombie. A system call, no waiting."""
        if self._pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    async def kill(self) -> None:
        """End it with SIGKILL and wait until it is gone. Idempotent. After `detach` it is no longer ours to end.

        Raises:
            Unavailable: it is still there after KILL_S.
        """
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        try:
            async with asyncio.timeout(KILL_S):
                await self.ended.wait()
        except TimeoutError as error:
            raise Unavailable(
                f"VM process {self.pid} is not gone {KILL_S:g} s after it was killed"
            ) from error

    def stderr_tail(self) -> str:
        """The last of what it wrote on its standard error, at most STDERR_TAIL_BYTES."""
        return read_tail(self.run_dir / STDERR_FILE, STDERR_TAIL_BYTES)

    def detach(self) -> None:
        """Stop watching; the process lives on. `alive` says False afterwards. Idempotent."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_end(self) -> None:
        if self._child:
            self.returncode = _reap(self._pidfd)
        self.detach()
        self.ended.set()


def spawn(
    arguments: Sequence[str], run_dir: Path, *, inherited_fds: Sequence[int], network_namespace: str = ""
) -> VmProcess:
    """Start a VM process in a session of its own, in a network namespace (its file; empty: this thread's).

    A pod's tap lies in the pod's namespace, and QEMU opens it by name (docs/adr/0011-qemu-in-the-pods-namespace.md).

    It does not die with us, holds no descriptor of ours but those named, and has its standard error in `run_dir`.
    Blocks for the few milliseconds of fork and exec: a worker thread might be in another namespace.

    Raises:
        Rejected: the program is missing or cannot be executed.
    """
    (run_dir / STDERR_FILE).unlink(missing_ok=True)
    with (run_dir / STDERR_FILE).open("ab") as stderr:
        try:
            child = run_in_file(
                network_namespace,
                lambda: subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    pass_fds=tuple(inherited_fds),
                    start_new_session=True,
                ),
            )
        except FileNotFoundError as error:
            raise Rejected(
                f"{arguments[0]} is not installed: install qemu-system-x86, or set vm.qemu"
            ) from error
        except OSError as error:
            raise Rejected(f"{arguments[0]} cannot be started: {error.strerror}") from error
    pidfd = os.pidfd_open(child.pid)
    # The pidfd watches and reaps it from here on; Popen must neither wait nor warn.
    child.returncode = 0
    _write_record(run_dir, child.pid)
    return VmProcess(child.pid, pidfd, run_dir, child=True)


def adopt(run_dir: Path, qmp_socket: Path) -> VmProcess | None:
    """The VM process that an earlier shim started in `run_dir`; None if it is gone.

    By the record beside it; where that is missing (the shim died right after the start), by who listens on its QMP
    socket.
    """
    for identity in (_recorded(run_dir), _listener(qmp_socket)):
        if identity is None:
            continue
        try:
            pidfd = os.pidfd_open(identity.pid)
        except OSError:
            continue
        # Only now that the pidfd holds on to the process does the comparison prove anything.
        if ProcessIdentity.of(identity.pid) != identity:
            os.close(pidfd)
            continue
        process = VmProcess(identity.pid, pidfd, run_dir, child=False)
        if process.alive:
            return process
        process.detach()
    return None


def read_tail(path: Path, size_bytes: int) -> str:
    """The end of a text file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size_bytes))
            return file.read(size_bytes).decode(errors="replace").strip()
    except OSError:
        return ""


def trim_log(path: Path, size_bytes_max: int) -> bool:
    """Empty a log that has outgrown its bound, its end kept beside it as "NAME.old"; whether it had.

    Its writer must append (O_APPEND). What it writes in between is lost. A guest can write to its console without end.
    """
    try:
        if path.stat().st_size <= size_bytes_max:
            return False
        with path.open("rb") as file:
            file.seek(-LOG_KEPT_BYTES, os.SEEK_END)
            path.with_name(f"{path.name}.old").write_bytes(file.read(LOG_KEPT_BYTES))
        os.truncate(path, 0)
    except OSError:
        return False
    return True


def _write_record(run_dir: Path, pid: int) -> None:
    if (identity := ProcessIdentity.of(pid)) is None:
        return
    temporary = run_dir / f"{PID_FILE}.new"
    temporary.write_text(json.dumps(asdict(identity)))
    temporary.rename(run_dir / PID_FILE)


def _recorded(run_dir: Path) -> ProcessIdentity | None:
    try:
        return ProcessIdentity(**json.loads((run_dir / PID_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _listener(socket_path: Path) -> ProcessIdentity | None:
    """Who called listen() on a Unix socket last, as the kernel remembers it."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0)
        try:
            connect_unix(probe, socket_path)
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        except OSError:
            return None
    pid: int = PEER_CREDENTIALS.unpack(credentials)[0]
    return ProcessIdentity.of(pid) if pid > 0 and pid != os.getpid() else None


def connect_unix(connection: socket.socket, path: Path) -> None:
    """Connect to a Unix socket whose path may be longer than the 107 bytes of an address."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        connection.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def listen_unix(path: Path) -> socket.socket:
    """A listening Unix socket, mode 0600, in place of whatever lies at `path`; the path may be long."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        path.chmod(0o600)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(folder)
    return listener


def _reap(pidfd: int) -> int | None:
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None  # Somebody else in this process reaped it first.
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
