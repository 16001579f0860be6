"""What a host still has of a sandbox that is not there any more: processes, taps, files, locks."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

from sandshift.cli.demo.lab import LabHost
from sandshift.cli.demo.leftovers import find_processes
from sandshift.net import namespace_path
from sandshift.net.namespace import run_in

TAP_PREFIX: Final = "ss"
OUTLIVE: Final = frozenset({"statements", "reports"})
"""Folders of STATE_DIR that are meant to outlive a session (docs/reference/shim.md)."""
SESSION_FILES: Final = ("session", "session.key", "session.config")


def left_on(host: LabHost, *, spared: frozenset[int] = frozenset()) -> list[str]:
    """Everything of any sandbox on `host`. Blocks for a few milliseconds."""
    return [*_processes(host, spared), *_taps(host), *_files(host), *_locks(host)]


def beside_the_guest(host: LabHost, *, spared: frozenset[int] = frozenset()) -> list[str]:
    """What the host that runs the guest has and should not: a second VM or shim, a second tap, books of an ended session."""
    processes, taps = _processes(host, spared), _taps(host)
    found = [f"too many on {host.names.letter}: {', '.join(processes)}"] if len(processes) > 2 else []
    found += [f"too many on {host.names.letter}: {', '.join(taps)}"] if len(taps) > 1 else []
    return found + [name for name in _files(host) if Path(name).name in SESSION_FILES]


def _processes(host: LabHost, spared: frozenset[int]) -> list[str]:
    inode = namespace_path(host.namespace).stat().st_ino
    found = set(find_processes({inode}, host.folder)) - {os.getpid()} - spared
    return sorted(f"process {pid} ({_command(pid)})" for pid in found if _command(pid))


def _command(pid: int) -> str:
    """Empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _taps(host: LabHost) -> list[str]:
    names = run_in(host.namespace, socket.if_nameindex)
    return [f"tap {name}" for _index, name in names if name.startswith(TAP_PREFIX)]


def _files(host: LabHost) -> list[str]:
    places = host.config.places
    run_dir, state_dir = Path(places.run_dir), Path(places.state_dir)
    kept = [state_dir / name for name in OUTLIVE]
    return sorted(
        str(path)
        for folder in (run_dir, state_dir)
        for path in folder.rglob("*")
        if not path.is_dir() and path.parent not in kept
    )


def _locks(host: LabHost) -> list[str]:
    """Locks that anybody holds on a file of this host. Source: proc_locks(5)."""
    inodes = {path.stat().st_ino: path for path in host.folder.rglob("*") if path.is_file()}
    held = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return [
        f"lock on {inodes[inode]}" for words in held if (inode := int(words[-3].rpartition(":")[2])) in inodes
    ]
