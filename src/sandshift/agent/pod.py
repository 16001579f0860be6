"""What all containers of the pod share: the guest's own files, /dev/shm and kernel settings, and a process namespace."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from sandshift.agent import cgroup, libc
from ttrpc import Code, StatusError

FOLDER: Final = Path("/run/sandshift")
VOLUMES: Final = FOLDER / "pod/volumes"
"""Folders of guest memory that the pod's containers share."""
SHM_BYTES: Final = 64 << 20
_HOLDER: Final = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
while True:
    signal.sigwait({signal.SIGCHLD})
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""


class Pod:
    """Made when it is first needed. `root`: where /etc and /proc/sys are."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._is_prepared = False
        self._holder: subprocess.Popen[bytes] | None = None

    def prepare(
        self, *, hosts: bytes, resolv_conf: bytes, shm_bytes: int, sysctls: Mapping[str, str]
    ) -> None:
        """Set what is given. Again with other values: those are in force.

        Raises:
            StatusError: INVALID_ARGUMENT: the kernel has no such setting, or refuses the value.
        """
        for place, content in (("etc/hosts", hosts), ("etc/resolv.conf", resolv_conf)):
            if content:
                (self._root / place).write_bytes(content)
        self._resize_shm(shm_bytes or SHM_BYTES)
        self.set_sysctls(sysctls)
        if not self._is_prepared:
            cgroup.delegate()
            _mount_volumes()
        self._is_prepared = True

    def ensure(self) -> None:
        """Prepare it with nothing of its own, unless it is prepared."""
        if not self._is_prepared:
            self.prepare(hosts=b"", resolv_conf=b"", shm_bytes=0, sysctls={})

    def set_sysctls(self, sysctls: Mapping[str, str]) -> None:
        for name, value in sysctls.items():
            place = sysctl_place(name)
            try:
                (self._root / "proc/sys" / place).write_text(value)
            except OSError as error:
                raise StatusError(
                    Code.INVALID_ARGUMENT,
                    f"the kernel setting {name} cannot be {value!r} in the guest: {error.strerror}",
                ) from error

    def pid_namespace(self) -> str:
        """The path of the process namespace that containers share. A process of ours is its process 1 and reaps orphans."""
        if self._holder is None or self._holder.poll() is not None:
            self._holder = _start_holder()
        return f"/proc/{self._holder.pid}/ns/pid"

    def _resize_shm(self, shm_bytes: int) -> None:
        try:
            libc.remount("/dev/shm", libc.MS_NOSUID | libc.MS_NODEV, f"size={shm_bytes}")  # noqa: S108
        except OSError as error:
            raise StatusError(
                Code.INVALID_ARGUMENT, f"the pod's shm cannot have {shm_bytes} bytes: {error.strerror}"
            ) from error


def sysctl_place(name: str) -> str:
    """Below /proc/sys: "net/ipv4/ip_forward". With slashes in a name its dots are literal.

    Raises:
        StatusError: INVALID_ARGUMENT: it is no name of a setting.
    """
    place = name if "/" in name else name.replace(".", "/")
    if not place or any(part in ("", ".", "..") for part in place.split("/")):
        raise StatusError(Code.INVALID_ARGUMENT, f"{name!r} is no name of a kernel setting")
    return place


def _mount_volumes() -> None:
    """A file system of their own: full, they leave the agent its own room."""
    VOLUMES.mkdir(parents=True, exist_ok=True)
    libc.mount("volumes", str(VOLUMES), "tmpfs", libc.MS_NODEV, "mode=0755,size=50%")


def _start_holder() -> subprocess.Popen[bytes]:
    ours = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc.new_pid_namespace()
        try:
            return subprocess.Popen(
                ["/usr/bin/python3", "-I", "-S", "-c", _HOLDER],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            libc.children_in(ours)
    except OSError as error:
        raise StatusError(
            Code.RESOURCE_EXHAUSTED, f"the pod's process namespace cannot be made: {error.strerror}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.close(ours)
