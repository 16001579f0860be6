from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from sandshift.errors import Rejected
from sandshift.vmm.process import (
    LOG_KEPT_BYTES,
    PID_FILE,
    ProcessIdentity,
    adopt,
    connect_unix,
    listen_unix,
    read_tail,
    spawn,
    trim_log,
)

SLEEP = ("sleep", "1000")


async def test_a_process_ends_with_its_status_and_last_words(tmp_path: Path) -> None:
    process = spawn(("sh", "-c", "echo goodbye >&2; exit 3"), tmp_path, inherited_fds=())
    await process.ended.wait()
    assert not process.alive
    assert process.returncode == 3
    assert process.stderr_tail() == "goodbye"


async def test_a_killed_process_says_which_signal_and_can_be_killed_again(tmp_path: Path) -> None:
    process = spawn(SLEEP, tmp_path, inherited_fds=())
    assert process.alive
    await process.kill()
    await process.kill()
    assert process.returncode == -signal.SIGKILL


async def test_a_process_has_a_session_of_its_own_and_none_of_our_descriptors(tmp_path: Path) -> None:
    ours = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(ours, True)
    given = os.open("/dev/zero", os.O_RDONLY)
    # One that speaks is loaded: before, the loader has a file open for a moment.
    process = spawn(("sh", "-c", "echo loaded >&2; kill -STOP $$"), tmp_path, inherited_fds=(given,))
    async with asyncio.timeout(20):
        while process.stderr_tail() != "loaded":
            await asyncio.sleep(0.01)
    assert os.getsid(process.pid) == process.pid
    assert sorted(int(fd.name) for fd in Path(f"/proc/{process.pid}/fd").iterdir()) == [0, 1, 2, given]
    await process.kill()
    os.close(ours)
    os.close(given)


async def test_it_does_not_die_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys, pathlib\n"
        "from sandshift.vmm.process import spawn\n"
        "async def main(): spawn(('sleep', '1000'), pathlib.Path(sys.argv[1]), inherited_fds=())\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-W", "ignore", "-c", program, tmp_path)
    assert await parent.wait() == 0
    found = adopt(tmp_path, tmp_path / "qmp")
    assert found is not None
    assert found.alive
    await found.kill()
    assert found.returncode is None
    assert adopt(tmp_path, tmp_path / "qmp") is None


async def test_a_missing_program_is_refused_with_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="/no/such/qemu is not installed: install qemu-system-x86"):
        spawn(("/no/such/qemu",), tmp_path, inherited_fds=())


async def test_a_pid_that_was_given_to_another_process_is_not_trusted(tmp_path: Path) -> None:
    process = spawn(SLEEP, tmp_path, inherited_fds=())
    record = json.loads((tmp_path / PID_FILE).read_text())
    (tmp_path / PID_FILE).write_text(json.dumps({**record, "started_ticks": record["started_ticks"] - 1}))
    assert adopt(tmp_path, tmp_path / "qmp") is None
    (tmp_path / PID_FILE).write_text(json.dumps({**record, "boot_id": "another boot"}))
    assert adopt(tmp_path, tmp_path / "qmp") is None
    (tmp_path / PID_FILE).write_text(json.dumps(record))
    found = adopt(tmp_path, tmp_path / "qmp")
    assert found is not None
    found.detach()
    await process.kill()


@pytest.mark.parametrize("content", ["", "12", "[]", '{"pid": 1}'])
async def test_a_broken_record_is_no_record(tmp_path: Path, content: str) -> None:
    (tmp_path / PID_FILE).write_text(content)
    assert adopt(tmp_path, tmp_path / "qmp") is None


async def test_without_a_record_the_listener_is_found_by_its_socket(tmp_path: Path) -> None:
    # As when the shim dies between the start and the record: QEMU calls listen() again on what it inherits.
    program = "import socket, sys, time; s = socket.socket(fileno=int(sys.argv[1])); s.listen(); print('ready', file=sys.stderr, flush=True); time.sleep(1000)"
    with listen_unix(tmp_path / "qmp") as listener:
        fd = listener.fileno()
        process = spawn((sys.executable, "-c", program, str(fd)), tmp_path, inherited_fds=(fd,))
    (tmp_path / PID_FILE).unlink()
    async with asyncio.timeout(10):
        while "ready" not in process.stderr_tail():
            await asyncio.sleep(0.01)
    found = adopt(tmp_path, tmp_path / "qmp")
    assert found is not None
    assert found.pid == process.pid
    found.detach()
    await process.kill()


def test_an_identity_names_a_process_even_with_a_strange_name() -> None:
    assert ProcessIdentity.of(os.getpid()) == ProcessIdentity.of(os.getpid())
    assert ProcessIdentity.of(4194305) is None


def test_sockets_may_lie_deeper_than_an_address_is_long(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with listen_unix(folder / "qmp") as listener, socket.socket(socket.AF_UNIX) as client:
        connect_unix(client, folder / "qmp")
        accepted, _ = listener.accept()
        with accepted:
            client.sendall(b"hello")
            assert accepted.recv(5) == b"hello"
    with listen_unix(folder / "qmp"), socket.socket(socket.AF_UNIX) as client:
        connect_unix(client, folder / "qmp")
        assert (folder / "qmp").is_socket(), "what an earlier one left was in nobody's way"


def test_only_the_end_of_a_long_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a" * 100 + b"\xff end\n")
    assert read_tail(tmp_path / "text", 6) == "\ufffd end"
    assert read_tail(tmp_path / "missing", 6) == ""


def test_a_log_that_outgrew_its_bound_is_emptied_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "console"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"x" * LOG_KEPT_BYTES + b"end")
        assert not trim_log(log, LOG_KEPT_BYTES + 3)
        assert trim_log(log, LOG_KEPT_BYTES)
        writer.write(b"more")
    assert log.read_bytes() == b"more"
    kept = (tmp_path / "console.old").read_bytes()
    assert len(kept) == LOG_KEPT_BYTES
    assert kept.endswith(b"xend")
    assert not trim_log(tmp_path / "missing", 1)
