"""A process of another user on the same host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

NOBODY_UID = 65534


async def run(program: str, *arguments: str, uid: int = NOBODY_UID) -> str:
    """What a Python program prints that runs as `uid`, in no group of ours."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "HOME": "/"},
        cwd="/",
        user=uid,
        group=uid,
        extra_groups=[],
    )
    said, _ = await process.communicate()
    return said.decode()


@contextlib.contextmanager
def folder_for_everybody() -> Iterator[Path]:
    """A folder that everybody may enter: pytest's own are closed."""
    folder = Path(tempfile.mkdtemp(prefix="sandshift-open-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
