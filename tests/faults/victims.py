"""Doing it: processes killed by their own records, the channel cut, the cable silent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sandshift.cli.demo.lab import Lab
from sandshift.cli.demo.topology import BRIDGE
from sandshift.errors import SandshiftError
from sandshift.fleet.host import Host
from sandshift.shim.handed_socket import copy_descriptor

END_S: Final = 10.0
"""How long a killed process may take to be gone."""


def shim_pid_file(host: Host, namespace: str, sandbox_id: str) -> Path:
    return host.config.sandbox_run_dir(namespace, sandbox_id) / "shim.pid"


def vm_pid_file(host: Host, namespace: str, sandbox_id: str) -> Path:
    return host.config.sandbox_run_dir(namespace, sandbox_id) / "vm" / "vm.pid"


def pid_in(record: Path) -> int | None:
    """The living process that `record` names; None if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = json.loads(record.read_text())
        if started_ticks(found["pid"]) == found["started_ticks"]:
            return int(found["pid"])
    return None


def started_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


async def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone. One that is gone already is no error."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            await asyncio.to_thread(_wait_for_end, process)
        finally:
            os.close(process)


def _wait_for_end(process: int) -> None:
    poller = select.poll()
    poller.register(process, select.POLLIN)
    if not poller.poll(END_S * 1000):
        raise TimeoutError(f"a killed process is not gone after {END_S:g} s")


def cut(pids: list[int], peers: set[str]) -> int:
    """End every TCP connection to one of `peers` that one of these processes holds; how many descriptors that were."""
    count = 0
    for pid in pids:
        for connection in _connections(pid, peers):
            with connection, contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def _connections(pid: int, peers: set[str]) -> Iterator[socket.socket]:
    """Copies of this process's connected TCP sockets that lead to one of `peers`."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError, SandshiftError):
                if str(link.readlink()).startswith("socket:"):
                    held = socket.socket(fileno=copy_descriptor(pid, int(link.name)))
                    name = held.getpeername() if held.family is socket.AF_INET else ("",)
                    if held.type is socket.SOCK_STREAM and name[0] in peers:
                        yield held
                    else:
                        held.close()


async def silence(lab: Lab) -> None:
    """Host A's cable goes nowhere: what either host sends is lost without a word. The carrier stays."""
    await _ip("-n", lab.switch_namespace, "link", "set", "dev", "pa", "nomaster")


async def end_silence(lab: Lab) -> None:
    await _ip("-n", lab.switch_namespace, "link", "set", "dev", "pa", "master", BRIDGE)


async def _ip(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec("ip", *arguments)
    if await process.wait() != 0:
        raise RuntimeError(f"ip {' '.join(arguments)} failed")
