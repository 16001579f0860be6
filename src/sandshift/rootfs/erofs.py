"""Packing a folder into an erofs image: the same bytes for the same content, whoever packs it and when."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from sandshift.errors import NoRoom, NotSupported, TimedOut, Unavailable

UUID: Final = "3d5f2a61-8c0b-4e57-9a43-5d8b1c6e7f20"
"""Of every packed image: mkfs.erofs draws one at random otherwise."""
PACK_S: Final = 600.0
FORMAT: Final = 1
"""Counts changes of how images are packed: what was packed before is then packed anew."""


def program() -> str:
    """Where mkfs.erofs is.

    Raises:
        NotSupported: it is not installed.
    """
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    if found := shutil.which("mkfs.erofs", path=path):
        return found
    raise NotSupported("mkfs.erofs not found: apt-get install erofs-utils")


def packer_identity() -> str:
    """Names the program that packs: another release may pack the same content into other bytes."""
    status = Path(program()).stat()
    return f"{FORMAT} {status.st_size} {status.st_mtime_ns}"


def pack(folder: Path, image: Path) -> None:
    """Write the content of `folder` to `image`. Blocks: 8 ms for 2 MB, about 1 s per GB.

    Raises:
        NoRoom: the disk is full. TimedOut: PACK_S passed. Unavailable: mkfs.erofs' own words.
    """
    command = [program(), "--quiet", "-T0", f"-U{UUID}", str(image), str(folder)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PACK_S,
            check=False,
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise TimedOut(f"root file system: mkfs.erofs did not end within {PACK_S:g} s") from error
    if done.returncode == 0:
        return
    said = done.stderr.decode(errors="replace").strip() or done.stdout.decode(errors="replace").strip()
    if "No space left" in said:
        raise NoRoom(f"{image.parent} has no space left to pack a root file system: free some")
    raise Unavailable(f"root file system: mkfs.erofs failed: {said[-500:]}")
