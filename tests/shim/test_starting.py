"""`start` and `delete` at the same time, a sandbox started twice, and a host whose disk is full."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.errors import Unavailable
from sandshift.shim.durable import Disk
from sandshift.shim.identity import started_ticks_of
from sandshift.shim.start import bind, write_pid_file
from sandshift.wire.containerd import sandbox_pb2, task_pb2
from sandshift.wire.migration import messages_pb2 as m
from tests.shim.house import SANDBOX, FakeHost, two_hosts


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[FakeHost]:
    host = FakeHost(tmp_path, "host")
    await host.start()
    yield host
    await host.stop()
    for process in list(host.world.processes.values()):
        process.die()


def test_of_many_starts_at_once_one_listens(tmp_path: Path) -> None:
    path, found, together = tmp_path / "shim.sock", [], threading.Barrier(8)

    def begin() -> None:
        together.wait()
        found.append(bind(path))

    path.write_text("")  # What a shim that was killed leaves: nobody listens on it.
    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listeners = [listener for listener in found if listener is not None]
    assert len(listeners) == 1
    listeners[0].close()


def test_the_pid_file_that_start_writes_names_that_very_process(tmp_path: Path) -> None:
    write_pid_file(tmp_path / "shim.pid", os.getpid())
    record = json.loads((tmp_path / "shim.pid").read_text())
    assert record == {"pid": os.getpid(), "started_ticks": started_ticks_of(os.getpid())}


async def test_a_sandbox_that_is_started_twice_at_once_has_one_vm(host: FakeHost) -> None:
    client = await host.client()
    await client.sandbox.create_sandbox(sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX))
    request = sandbox_pb2.StartSandboxRequest(sandbox_id=SANDBOX)
    first, second = await asyncio.gather(
        client.sandbox.start_sandbox(request), client.sandbox.start_sandbox(request)
    )
    assert first.pid == second.pid == host.process.pid
    assert len(host.world.log.entries) == 1
    await client.connection.close()


async def test_a_shim_that_is_stopped_before_it_had_a_sandbox_leaves_none_that_has_ended(
    host: FakeHost,
) -> None:
    """A coordinator that looks whether a destination is free, and is killed before it has cleared its look away."""
    client = await host.client()
    await client.sandbox.stop_sandbox(sandbox_pb2.StopSandboxRequest(sandbox_id=SANDBOX))
    await client.connection.close()
    await host.stop()
    await host.start()
    client = await host.client()
    assert (await client.status()).life == "absent"
    assert not host.places.sandbox_file.exists()
    await client.await_sandbox()
    await client.connection.close()


@pytest.mark.parametrize("call", ["ShutdownSandbox", "Task.Shutdown"])
async def test_a_shim_that_is_told_to_end_ends_though_its_caller_goes_away(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr("sandshift.shim.sandbox_service.LINGER_S", 0.0)
    monkeypatch.setattr("sandshift.shim.tasks.task_service.LINGER_S", 0.0)
    server = host.server
    assert server is not None
    end, is_ending, go_on = server.sandbox.stop, asyncio.Event(), asyncio.Event()

    async def slowly(timeout_s: float) -> None:
        is_ending.set()
        await go_on.wait()
        await end(timeout_s)

    monkeypatch.setattr(server.sandbox, "stop", slowly)
    client = await host.client()
    if call == "ShutdownSandbox":
        await client.start_sandbox()
        asking = client.sandbox.shutdown_sandbox(sandbox_pb2.ShutdownSandboxRequest(sandbox_id=SANDBOX))
    else:
        server.sandbox.containers.own_sandbox = True
        await client.start_sandbox()
        asking = client.task.shutdown(task_pb2.ShutdownRequest(id=SANDBOX))
    calling = asyncio.ensure_future(asking)
    await is_ending.wait()
    await client.connection.close()
    with pytest.raises(ttrpc.ConnectionClosed):
        await calling
    while server.server._connections:
        await asyncio.sleep(0)
    go_on.set()
    async with asyncio.timeout(5):
        await server.shut_down.wait()


async def test_a_start_that_cannot_write_down_its_taps_leaves_none(host: FakeHost) -> None:
    host.places.taps_file.mkdir()  # A file cannot be written there, whoever asks.
    client = await host.client()
    request = sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX)
    await client.sandbox.create_sandbox(request)
    with pytest.raises(ttrpc.StatusError, match=r"taps\.json cannot be written") as told:
        await client.sandbox.start_sandbox(sandbox_pb2.StartSandboxRequest(sandbox_id=SANDBOX))
    assert told.value.code is ttrpc.Code.UNAVAILABLE
    assert host.taps.made == []
    await client.connection.close()


async def test_an_error_of_the_disk_is_unavailable_and_named(tmp_path: Path) -> None:
    disk = Disk()
    with pytest.raises(Unavailable, match="missing: No such file"):
        await disk.run((tmp_path / "missing").read_bytes)
    disk.close()


async def test_books_go_though_the_report_cannot_be_kept(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.export()
        places = hosts.source.places
        places.reports_dir.parent.mkdir(parents=True, exist_ok=True)
        places.reports_dir.write_text("not a folder")
        await hosts.s.finalize(hosts.session, 2)
        await hosts.s.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
        assert not places.journal_file.exists()
        assert not places.journal_file.with_name("session.key").exists()
