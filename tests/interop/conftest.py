"""Where there is no Go a person's run says so and goes on; in CI it fails."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from tests.interop.presence import program_or_skip


@pytest.fixture(scope="session")
def go() -> Path:
    return program_or_skip(os.environ)


@pytest.fixture
async def go_server(go: Path, tmp_path: Path) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """A Go server's socket and process."""
    path = str(tmp_path / "go.sock")
    process = await asyncio.create_subprocess_exec(go, "serve", path, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"listening\n"
    yield path, process
    if process.returncode is None:
        process.send_signal(signal.SIGKILL)
    await process.wait()


@pytest.fixture
async def client(go_server: tuple[str, asyncio.subprocess.Process]) -> AsyncIterator[ttrpc.Client]:
    """Our client of the Go server."""
    async with await ttrpc.connect(go_server[0]) as client:
        yield client
