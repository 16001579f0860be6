"""A shim that begins while the one before it still ends: two never work on one sandbox, and the first takes nothing along."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.shim.identity import started_ticks_of
from sandshift.shim.own_socket import bound, withdraw
from sandshift.shim.predecessor import wait_for_end
from sandshift.shim.start import bind
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.containerd.sandbox_ttrpc import SandboxClient
from sandshift.wire.sandshift import shim_pb2
from sandshift.wire.sandshift.shim_ttrpc import ShimClient

END_S = 20.0


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Lives until its standard input is closed, and longer than any SIGTERM."""
    program = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def record_of(pid: int, started_ticks: int) -> str:
    return json.dumps({"pid": pid, "started_ticks": started_ticks})


async def test_a_shim_begins_when_the_one_before_it_has_ended(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    record = record_of(process.pid, started_ticks_of(process.pid))
    waiting = asyncio.create_task(asyncio.to_thread(wait_for_end, record, patience_s=END_S))
    process.stdin.close()
    await waiting
    assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    assert process.wait() == 0


def test_one_that_hangs_as_it_ends_is_killed(process: subprocess.Popen[bytes]) -> None:
    wait_for_end(record_of(process.pid, started_ticks_of(process.pid)), patience_s=0.0)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("record", ["", "{", "[]", '{"pid": %d}', '{"pid": "%d?", "started_ticks": 1}'])
def test_what_names_no_process_is_not_waited_for(process: subprocess.Popen[bytes], record: str) -> None:
    wait_for_end(record % process.pid if "%" in record else record, patience_s=0.0)
    assert process.poll() is None, "a process that the record does not name for certain is never killed"


def test_another_process_with_the_same_number_is_not_waited_for(process: subprocess.Popen[bytes]) -> None:
    wait_for_end(record_of(process.pid, started_ticks_of(process.pid) + 1), patience_s=0.0)
    wait_for_end(record_of(os.getpid(), started_ticks_of(os.getpid())), patience_s=0.0)
    assert process.poll() is None


def listener_at(path: Path) -> socket.socket:
    found = bind(path)
    assert found is not None
    return socket.socket(fileno=found.detach())


def test_a_shim_that_ends_removes_no_socket_but_its_own(tmp_path: Path) -> None:
    path, pid_file = tmp_path / "shim.sock", tmp_path / "shim.pid"
    listener_at(path).close()
    os.utime(path, ns=(1, 1))  # The number of its inode may come again at once, its time does not.
    first = bound(path)
    with listener_at(path):
        pid_file.write_text("the second's")
        assert not withdraw(path, pid_file, first, lambda: pytest.fail("nothing may be forgotten"))
        assert (path.exists(), pid_file.exists()) == (True, True)
        assert withdraw(path, pid_file, bound(path))
        assert (path.exists(), pid_file.exists()) == (False, False)


def test_places_that_are_gone_already_are_no_error(tmp_path: Path) -> None:
    forgotten: list[bool] = []
    assert withdraw(tmp_path / "shim.sock", tmp_path / "shim.pid", (7, 7), lambda: forgotten.append(True))
    assert forgotten == [True]
    assert withdraw(tmp_path / "gone" / "shim.sock", tmp_path / "gone" / "shim.pid", (7, 7))


def start(folder: Path) -> int:
    """The real program; answers the pid of the shim that serves."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "SANDSHIFT_CONFIG": str(folder / "config.toml"),
        "MAX_SHIM_VERSION": "2",
    }
    command = ["sandshift.shim.bootstrap", "-namespace", "test", "-id", "box", "start"]
    subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=END_S,
        check=True,
    )
    return int(json.loads(next(folder.rglob("shim.pid")).read_text())["pid"])


def terminate(pid: int) -> int:
    """SIGTERM; answers a pidfd, which tells the end."""
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGTERM)
    return process


def ended(process: int) -> bool:
    found = bool(select.select([process], [], [], END_S)[0])
    os.close(process)
    return found


async def nobody_listens(path: Path) -> None:
    async with asyncio.timeout(END_S):
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) != 0:
                    return
            await asyncio.sleep(0.01)


async def test_a_shim_started_while_the_first_answers_its_last_call_is_the_one_that_is_found(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.toml").write_text(
        f'[places]\nrun_dir = "{tmp_path}/run"\nstate_dir = "{tmp_path}/state"\ncache_dir = "{tmp_path}/cache"\n'
    )
    first = start(tmp_path)
    path = next(tmp_path.rglob("*.sock"))
    client = await ttrpc.connect(str(path))
    request = sandbox_pb2.CreateSandboxRequest(sandbox_id="box")
    request.annotations["io.sandshift.migration.destination"] = "true"
    await SandboxClient(client).create_sandbox(request, timeout_s=END_S)
    # A call that is open while the shim ends: it is given some seconds.
    waiting = asyncio.create_task(
        SandboxClient(client).wait_sandbox(sandbox_pb2.WaitSandboxRequest(sandbox_id="box"))
    )
    await ShimClient(client).status(
        shim_pb2.StatusRequest(), timeout_s=END_S
    )  # The shim has read the call before it.
    process = terminate(first)
    await nobody_listens(path)
    second = await asyncio.to_thread(start, tmp_path)
    assert await asyncio.to_thread(ended, process)
    await asyncio.wait([waiting])
    assert waiting.exception() is not None
    await client.close()
    try:
        client = await ttrpc.connect(str(path), timeout_s=END_S)
        status = await ShimClient(client).status(shim_pb2.StatusRequest(), timeout_s=END_S)
        assert (status.shim_pid, status.life) == (second, "awaiting")
        assert json.loads(next(tmp_path.rglob("shim.pid")).read_text())["pid"] == second
        await client.close()
    finally:
        assert await asyncio.to_thread(ended, terminate(second))
