"""Finding and ending what belongs to a lab: by its network namespaces and by its folder in the environment.

Every process of a lab either lives in one of its namespaces or was started with SANDSHIFT_CONFIG naming a file in its
folder. Nothing is ever ended by its name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from sandshift.config import PATH_VARIABLE
from sandshift.errors import Unavailable
from sandshift.net import namespace_path

_END_DEADLINE_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.01


def end_processes(namespaces: Iterable[str], folder: Path) -> int:
    """SIGKILL every process of the lab and those that they start meanwhile; returns how many there were. Blocks.

    Raises:
        Unavailable: some are still there after ten seconds; names them.
    """
    inodes = {inode for name in namespaces if (inode := _inode(namespace_path(name)))}
    spared = set(_ancestors(os.getpid()))
    ended: set[int] = set()
    deadline_s = time.monotonic() + _END_DEADLINE_S
    while found := set(find_processes(inodes, folder)) - spared:
        if time.monotonic() > deadline_s:
            raise Unavailable(f"lab {folder.name}: processes {sorted(found)} do not end after SIGKILL")
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended |= found
        time.sleep(_LOOK_AGAIN_S)
    return len(ended)


def find_processes(namespace_inodes: set[int], folder: Path) -> Iterator[int]:
    """Ids of living processes in these namespaces, or whose configuration is in `folder`."""
    marker = f"{PATH_VARIABLE}={folder}/".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        # A zombie has no namespaces to look at and an empty environment: it is not found.
        if _inode(entry / "ns/net") in namespace_inodes or any(
            variable.startswith(marker) for variable in _environment(entry).split(b"\0")
        ):
            yield int(entry.name)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def _ancestors(pid: int) -> Iterator[int]:
    """`pid` and those it comes from: a lab never ends who runs it."""
    while pid > 1:
        yield pid
        try:
            # Fields after the command's closing bracket: state, ppid. Source: proc(5).
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return
