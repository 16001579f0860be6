"""containerd's own ttrpc client, in Go, against our server: every check in tests/interop/go/checks.go."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

import ttrpc
from tests.interop.echo import EchoServer

CHECKS = re.findall(
    r'^\t"([^"]+)": +check\w+,$', (Path(__file__).parent / "go" / "checks.go").read_text(), re.MULTILINE
)


def test_every_check_of_the_go_program_is_run() -> None:
    assert len(CHECKS) == 27


@pytest.mark.parametrize("name", CHECKS)
async def test_a_go_client_of_our_server(go: Path, tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "ours.sock")
    echo = EchoServer()
    serving = asyncio.create_task(echo.server.serve(ttrpc.listen(path)))
    process = await asyncio.create_subprocess_exec(
        go, "check", path, name, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    # On stderr it may log late answers to calls that it has given up.
    assert (out.decode(), process.returncode) == ("ok\n", 0), err.decode()
    await echo.server.shutdown(grace_s=0)
    await serving


async def test_a_connection_that_goes_cancels_its_handlers(go: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "ours.sock")
    echo = EchoServer()
    serving = asyncio.create_task(echo.server.serve(ttrpc.listen(path)))
    # "disconnected" opens an endless stream, which this ends by cutting the connection.
    process = await asyncio.create_subprocess_exec(
        go, "check", path, "disconnected", stdout=asyncio.subprocess.PIPE
    )
    assert (await process.communicate())[0] == b"ok\n"
    async with asyncio.timeout(30):
        while not echo.cancelled:
            await asyncio.sleep(0)
    await echo.server.shutdown(grace_s=0)
    await serving


async def test_a_go_client_that_is_killed_cancels_its_handlers(go: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "ours.sock")
    echo = EchoServer()
    serving = asyncio.create_task(echo.server.serve(ttrpc.listen(path)))
    process = await asyncio.create_subprocess_exec(go, "hang", path, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"hanging\n"
    process.kill()
    await process.wait()
    async with asyncio.timeout(30):
        while echo.cancelled < 2:
            await asyncio.sleep(0)
    await echo.server.shutdown(grace_s=0)
    await serving
