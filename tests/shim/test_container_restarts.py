"""A shim that begins where an earlier one was killed: containers, stdio, exits and events go on."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

import ttrpc
from sandshift.errors import Damaged
from sandshift.guest.containers import ContainerEvent
from sandshift.shim.tasks.roster import Book
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.containerd import task_types_pb2
from tests.shim.fake_agent import FakeGuestContainers
from tests.shim.house import SANDBOX, FakeHost, HostClient
from tests.shim.pod import Bundle, Containerd, bundles, exec_request, lines, run

MANY = 9 * 60
Make = Callable[..., Bundle]


@pytest.fixture
async def containerd(tmp_path: Path) -> AsyncIterator[Containerd]:
    made = Containerd(tmp_path / "events.sock")
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def host(tmp_path: Path, containerd: Containerd) -> AsyncIterator[FakeHost]:
    made = FakeHost(tmp_path, "host")
    made.events_path = containerd.address
    await made.start()
    client = await made.client()
    await client.start_sandbox()
    await client.connection.close()
    yield made
    if made.server is not None:
        await made.stop()
    for process in list(made.world.processes.values()):
        process.die()


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    async with bundles(tmp_path / "bundles") as made:
        yield made


async def begin_again(host: FakeHost) -> HostClient:
    if host.server is not None:
        await host.stop()
    await host.start()
    return await host.client()


async def status(client: HostClient, name: str, exec_id: str = "") -> str:
    told = await client.task.state(pb.StateRequest(id=name, exec_id=exec_id), timeout_s=5)
    return task_types_pb2.Status.Name(told.status)


async def test_output_goes_on_byte_for_byte(host: FakeHost, make: Make):
    client = await host.client()
    bundle = make("c1", ["flood"])
    await run(client.task, bundle)
    bundle.stdout.hold()
    bundle.stderr.hold()
    for _ in range(3):
        seen = len(bundle.stdout.data)
        await bundle.stdout.until(seen + MANY)
        await client.connection.close()
        client = await begin_again(host)
    said = lines(await bundle.stdout.until(len(bundle.stdout.data) + MANY))
    assert len(said) > 4 * MANY // 9 - 4
    assert lines(bytes(bundle.stderr.data), step=10)[0] == said[0]
    await client.connection.close()


async def test_a_connection_to_the_agent_that_ends_while_events_are_awaited_is_no_unheard_error(
    host: FakeHost, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    client = await host.client()
    ended = asyncio.Event()

    async def events(_containers: FakeGuestContainers, _from: int = 0) -> AsyncIterator[ContainerEvent]:
        ended.set()
        raise ttrpc.ConnectionClosed("the guest has let go")
        yield ContainerEvent(0, "", "", 0)

    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unheard.append(context))
    monkeypatch.setattr(FakeGuestContainers, "events", events)
    caplog.set_level(logging.INFO, "sandshift.shim.tasks.roster")
    await client.connection.close()
    client = await begin_again(host)
    await asyncio.wait_for(ended.wait(), 5)
    while "container events: the connection to the agent is over" not in caplog.text:
        await asyncio.sleep(0)
    gc.collect()
    assert unheard == []
    await client.connection.close()


async def test_an_exit_that_no_shim_saw_is_told_by_the_next(
    host: FakeHost, make: Make, containerd: Containerd
):
    client = await host.client()
    pid = await run(client.task, make("c1", ["wait"]))
    await client.connection.close()
    await host.stop()
    host.process.guest.containers.signal("c1:", 15, 0.0)
    client = await begin_again(host)
    assert (await client.task.connect(pb.ConnectRequest(id="c1"))).task_pid == pid
    assert [one.pid for one in (await client.task.pids(pb.PidsRequest(id="c1"))).processes] == [pid]
    assert (await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)).exit_status == 143
    assert await status(client, "c1") == "STOPPED"
    await containerd.until("/tasks/exit")
    assert (await client.task.delete(pb.DeleteRequest(id="c1"))).exit_status == 143
    await client.connection.close()


async def test_an_exit_is_kept_until_delete_and_told_once(host: FakeHost, make: Make, containerd: Containerd):
    client = await host.client()
    await run(client.task, make("c1", ["exit", "9"]))
    await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)
    await client.connection.close()
    client = await begin_again(host)
    assert (await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)).exit_status == 9
    await client.task.delete(pb.DeleteRequest(id="c1"))
    await containerd.until("/tasks/delete")
    assert containerd.topics.count("/tasks/exit") == 1
    await client.connection.close()


async def test_exec_sessions_and_pauses_are_known_again(host: FakeHost, make: Make):
    client = await host.client()
    bundle = make("c1", ["wait"])
    await run(client.task, bundle)
    await client.task.exec(exec_request(bundle, "running", ["wait"]))
    await client.task.start(pb.StartRequest(id="c1", exec_id="running"))
    await client.task.exec(exec_request(bundle, "added", ["exit", "4"]))
    await client.task.pause(pb.PauseRequest(id="c1"))
    await client.connection.close()
    client = await begin_again(host)
    assert await status(client, "c1") == "PAUSED"
    await client.task.resume(pb.ResumeRequest(id="c1"))
    assert await status(client, "c1", "running") == "RUNNING"
    assert await status(client, "c1", "added") == "CREATED"
    await client.task.start(pb.StartRequest(id="c1", exec_id="added"))
    told = await client.task.wait(pb.WaitRequest(id="c1", exec_id="added"), timeout_s=5)
    assert told.exit_status == 4
    await client.connection.close()


async def test_input_goes_on(host: FakeHost, make: Make):
    client = await host.client()
    bundle = make("c1", ["cat"], stdin=True)
    await run(client.task, bundle)
    bundle.stdout.hold()
    writer = os.open(bundle.paths["stdin"], os.O_RDWR)
    os.write(writer, b"before ")
    await bundle.stdout.until(7)
    await client.connection.close()
    await host.stop()
    os.write(writer, b"between ")
    client = await begin_again(host)
    os.write(writer, b"after")
    assert await bundle.stdout.until(20) == b"before between after"
    await client.task.close_io(pb.CloseIORequest(id="c1", stdin=True))
    await client.connection.close()
    client = await begin_again(host)
    os.close(writer)
    assert (await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)).exit_status == 0
    await client.connection.close()


async def test_a_container_that_was_never_made_whole_is_dropped(host: FakeHost, make: Make):
    client = await host.client()
    await run(client.task, make("c1", ["wait"]))
    await client.connection.close()
    await host.stop()
    book = msgspec.json.decode(host.places.containers_file.read_bytes(), type=Book)
    book.containers[0].made = False
    host.places.containers_file.write_bytes(msgspec.json.encode(book))
    host.process.guest.containers.tasks["c1:"].started = False
    client = await begin_again(host)

    async def gone() -> bool:
        try:
            await client.task.state(pb.StateRequest(id="c1"))
        except ttrpc.StatusError as error:
            return error.code is ttrpc.Code.NOT_FOUND
        return False

    for _ in range(500):
        if await gone():
            break
    assert host.process.guest.containers.containers == {}
    await client.connection.close()


async def test_a_sandbox_that_came_with_its_container_still_goes_with_it(tmp_path: Path, make: Make):
    host = FakeHost(tmp_path / "other", "host")
    (tmp_path / "other").mkdir()
    await host.start()
    client = await host.client()
    await run(client.task, make(SANDBOX, ["exit", "0"]))
    await client.task.wait(pb.WaitRequest(id=SANDBOX), timeout_s=5)
    await client.connection.close()
    client = await begin_again(host)
    await client.task.delete(pb.DeleteRequest(id=SANDBOX))
    await client.task.shutdown(pb.ShutdownRequest(id=SANDBOX))
    assert not host.world.processes[host.places.vm_dir].alive
    await client.connection.close()
    await host.stop()


async def test_what_cannot_be_believed_stops_the_shim_and_leaves_the_vm(host: FakeHost, make: Make):
    await host.stop()
    host.places.containers_file.write_text("{")
    with pytest.raises(Damaged, match=r"containers cannot be read: .*; the VM is left as it is"):
        await host.start()
    assert host.process.alive
    host.server = None


async def test_a_vm_that_died_without_a_shim_ends_its_containers_with_the_next(
    host: FakeHost, make: Make, containerd: Containerd
):
    client = await host.client()
    await run(client.task, make("c1", ["wait"]))
    await client.connection.close()
    await host.stop()
    host.process.die()
    client = await begin_again(host)
    assert (await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)).exit_status == 137
    await containerd.until("/tasks/exit")
    await client.connection.close()


async def test_a_shim_that_died_between_the_end_of_its_sandbox_and_that_of_its_containers_leaves_both(
    host: FakeHost, make: Make, containerd: Containerd
):
    """What was on disk then: a sandbox that has moved away, with containers that run."""
    client = await host.client()
    await run(client.task, make("c1", ["wait"]))
    await client.connection.close()
    server = host.server
    assert server is not None
    before = host.places.containers_file.read_bytes()
    await server.sandbox.end(255, moved_to="session s1, 10.0.0.2")
    await host.stop()
    host.places.containers_file.write_bytes(before)
    client = await begin_again(host)
    waited = await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)
    assert waited.exit_status == 255
    await client.task.delete(pb.DeleteRequest(id="c1"), timeout_s=5)
    await containerd.until("/tasks/delete")
    assert "/tasks/exit" in containerd.topics
    await client.connection.close()


async def test_a_shim_that_comes_to_follow_after_the_last_stop_takes_nothing(host: FakeHost, make: Make):
    client = await host.client()
    bundle = make("c1", ["flood"])
    await run(client.task, bundle)
    await bundle.stdout.until(MANY)
    sandbox = host.server.sandbox
    offsets = sandbox.freeze_output()
    sandbox.containers.follow(sandbox.guest)
    await client.task.state(pb.StateRequest(id="c1"))
    assert sandbox.containers.freeze() == offsets
    sandbox.thaw_output()
    lines(await bundle.stdout.until(offsets["c1:", 1] + MANY))
    await client.connection.close()
