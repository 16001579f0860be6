"""A pod moves between two hosts as its callers see it: stdio byte for byte, exec sessions, exits, events."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import ttrpc
from sandshift.errors import Unavailable
from sandshift.sandbox.model import SOURCE_CONTAINER_ANNOTATION
from sandshift.shim.sandbox import EXIT_KILLED
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.containerd import task_types_pb2
from sandshift.wire.migration import messages_pb2 as m
from tests.shim.house import FakeHost, HostClient, TwoHosts, two_hosts
from tests.shim.pod import Bundle, Containerd, bundles, exec_request, lines, run

RESUME, STOP = m.FINALIZE_ACTION_RESUME, m.FINALIZE_ACTION_STOP
MANY = 9 * 60
"""Bytes of a stream that a test waits for: 60 lines."""
Make = Callable[..., Bundle]


@pytest.fixture
async def containerds(tmp_path: Path) -> AsyncIterator[dict[str, Containerd]]:
    """Of the source and of the destination."""
    made = {name: Containerd(tmp_path / f"{name}-events.sock") for name in ("source", "destination")}
    for one in made.values():
        await one.start()
    yield made
    for one in made.values():
        await one.stop()


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    async with bundles(tmp_path / "there") as made:
        yield made


@pytest.fixture
async def make_here(tmp_path: Path) -> AsyncIterator[Make]:
    """Bundles of the destination; of NAME-moved for container NAME of the source."""
    async with bundles(tmp_path / "here") as made:

        def patch(name: str, **how: object) -> Bundle:
            return made(f"{name}-moved", [], annotations={SOURCE_CONTAINER_ANNOTATION: name}, **how)

        yield patch


@pytest.fixture
async def hosts(tmp_path: Path, containerds: dict[str, Containerd]) -> AsyncIterator[TwoHosts]:
    events = {name: one.address for name, one in containerds.items()}
    async with two_hosts(tmp_path, events=events) as both:
        yield both


async def come(hosts: TwoHosts, *patches: Bundle) -> None:
    """Up to the transfer's end, with the containers made at the destination as CRI and ctr make them."""
    await hosts.import_config((await hosts.export()).config)
    for bundle in patches:
        await run(hosts.d.task, bundle)
    await hosts.d.migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=hosts.session), timeout_s=10)
    await hosts.connect()
    await hosts.transfer()


async def finish(hosts: TwoHosts) -> None:
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session), timeout_s=10)


async def with_receipts(hosts: TwoHosts) -> None:
    """As `finish`, of an orchestrator that carries receipts: the shims may not have found each other again."""
    for client, peer, action in (
        (hosts.d, hosts.s, RESUME),
        (hosts.s, hosts.d, STOP),
        (hosts.d, hosts.s, RESUME),
        (hosts.s, hosts.d, STOP),
    ):
        receipt = (await peer.status()).session.receipt
        with contextlib.suppress(ttrpc.StatusError):
            await client.finalize(hosts.session, action, receipt)
    await finish(hosts)


async def status(client: HostClient, name: str, exec_id: str = "") -> str:
    told = await client.task.state(pb.StateRequest(id=name, exec_id=exec_id), timeout_s=5)
    return task_types_pb2.Status.Name(told.status)


async def test_output_goes_on_at_the_destination_without_a_byte_lost_or_repeated(
    hosts: TwoHosts, make: Make, make_here: Make
) -> None:
    there = [make(name, ["flood"]) for name in ("web", "db")]
    for bundle in there:
        await run(hosts.s.task, bundle)
    here = [make_here(name) for name in ("web", "db")]
    for bundle in there:
        await bundle.stdout.until(MANY)
    await come(hosts, *here)
    await finish(hosts)
    for before, after in zip(there, here, strict=True):
        first = await before.stdout.all()
        rest = await after.stdout.until(MANY)
        assert len(lines(first + rest)) > 120
        errors = await before.stderr.all() + await after.stderr.until(9)
        lines(errors, step=10)


async def test_a_reader_that_does_not_read_holds_up_nobody_and_misses_nothing(
    hosts: TwoHosts, make: Make, make_here: Make
) -> None:
    """What is in the fifo belongs to the source's caller, what is in the agent to the destination's."""
    there = make("web", ["flood"], reads=False)
    await run(hosts.s.task, there)
    here = make_here("web")
    await come(hosts, here)
    await finish(hosts)
    there.stdout.read()
    first = await there.stdout.all()
    assert first
    assert len(lines(first + await here.stdout.until(MANY))) * 9 > len(first) + MANY - 9


async def test_the_callers_of_the_destination_have_the_containers_afterwards(
    hosts: TwoHosts, make: Make, make_here: Make, containerds: dict[str, Containerd]
) -> None:
    pid = await run(hosts.s.task, make("web", ["wait"]))
    here = make_here("web")
    await come(hosts, here)
    waiting = asyncio.create_task(hosts.d.task.wait(pb.WaitRequest(id="web-moved")))
    await finish(hosts)
    assert await status(hosts.d, "web-moved") == "RUNNING"
    told = await hosts.d.task.state(pb.StateRequest(id="web-moved"))
    assert (told.pid, told.bundle, told.stdout) == (pid, str(here.folder), here.stdout.path)
    assert (await hosts.d.task.start(pb.StartRequest(id="web-moved"))).pid == pid
    await hosts.d.task.exec(exec_request(here, "e1", ["exit", "3"]))
    await hosts.d.task.start(pb.StartRequest(id="web-moved", exec_id="e1"))
    ended = await hosts.d.task.wait(pb.WaitRequest(id="web-moved", exec_id="e1"), timeout_s=5)
    assert ended.exit_status == 3
    await hosts.d.task.kill(pb.KillRequest(id="web-moved", signal=9))
    assert (await asyncio.wait_for(waiting, 5)).exit_status == 137
    await hosts.d.task.delete(pb.DeleteRequest(id="web-moved"))
    topics = containerds["destination"].topics
    await containerds["destination"].until("/tasks/delete")
    assert topics[0] == "/tasks/create"
    assert "/tasks/start" not in topics


async def test_the_sources_tasks_exit_with_255_and_the_event_says_where_to(
    hosts: TwoHosts, make: Make, make_here: Make, containerds: dict[str, Containerd]
) -> None:
    pid = await run(hosts.s.task, make("web", ["wait"]))
    await come(hosts, make_here("web"))
    waiting = asyncio.create_task(hosts.s.task.wait(pb.WaitRequest(id="web")))
    await finish(hosts)
    assert (await asyncio.wait_for(waiting, 5)).exit_status == 255
    await containerds["source"].until("/sandshift/migrated")
    await containerds["source"].until("/tasks/exit")
    events = dict(containerds["source"].events())
    assert events["/sandshift/migrated"].session_id == hosts.session
    assert events["/sandshift/migrated"].destination
    exited = events["/tasks/exit"]
    assert (exited.container_id, exited.id, exited.pid, exited.exit_status) == ("web", "web", pid, 255)
    gone = await hosts.s.task.delete(pb.DeleteRequest(id="web"))
    assert (gone.pid, gone.exit_status) == (pid, 255)


async def test_a_vm_that_dies_as_its_session_ends_it_has_moved_once(
    hosts: TwoHosts, make: Make, make_here: Make, containerds: dict[str, Containerd]
) -> None:
    await run(hosts.s.task, make("web", ["wait"]))
    await come(hosts, make_here("web"))
    await finish(hosts)
    assert hosts.destination.server is not None
    sandbox = hosts.destination.server.sandbox
    await asyncio.gather(*(sandbox.end(255, moved_to="session later, there") for _ in range(2)))
    await hosts.d.task.wait(pb.WaitRequest(id="web-moved"), timeout_s=5)
    await containerds["destination"].until("/tasks/exit")
    assert containerds["destination"].topics.count("/sandshift/migrated") == 1


async def test_an_exec_session_goes_on_and_is_bound_by_its_id(
    hosts: TwoHosts, make: Make, make_here: Make
) -> None:
    there, out = make("web", ["wait"]), make("exec", [])
    await run(hosts.s.task, there)
    await hosts.s.task.exec(exec_request(there, "e1", ["flood"], stdout=out.stdout.path))
    await hosts.s.task.start(pb.StartRequest(id="web", exec_id="e1"))
    await out.stdout.until(MANY)
    here, out_here = make_here("web"), make_here("exec")
    await come(hosts, here)
    await finish(hosts)
    assert await status(hosts.d, "web-moved", "e1") == "RUNNING"
    await hosts.d.task.exec(exec_request(here, "e1", ["flood"], stdout=out_here.stdout.path))
    await hosts.d.task.start(pb.StartRequest(id="web-moved", exec_id="e1"))
    lines(await out.stdout.all() + await out_here.stdout.until(MANY))


async def test_the_end_of_an_exec_session_that_has_come_is_told_once_it_has_its_caller(
    hosts: TwoHosts, make: Make, make_here: Make, containerds: dict[str, Containerd]
) -> None:
    """Before, the destination's containerd knows of no such session."""
    there, here, out_here = make("web", ["wait"]), make_here("web"), make_here("exec")
    await run(hosts.s.task, there)
    await hosts.s.task.exec(exec_request(there, "e1", ["wait"]))
    await hosts.s.task.start(pb.StartRequest(id="web", exec_id="e1"))
    await come(hosts, here)
    await finish(hosts)
    hosts.destination.process.guest.containers.signal("web:e1", 9, 0.0)
    ended = await hosts.d.task.wait(pb.WaitRequest(id="web-moved", exec_id="e1"), timeout_s=5)
    assert ended.exit_status == 137
    await hosts.d.task.exec(exec_request(here, "e1", ["wait"], stdout=out_here.stdout.path))
    await hosts.d.task.start(pb.StartRequest(id="web-moved", exec_id="e1"))
    destination = containerds["destination"]
    await destination.until("/tasks/exit")
    assert destination.topics == ["/tasks/create", "/tasks/exec-added", "/tasks/exit"]
    assert destination.events()[-1][1].id == "e1"


async def test_a_vm_that_dies_while_an_exec_session_gets_its_caller_is_told_of_after_the_session(
    hosts: TwoHosts,
    make: Make,
    make_here: Make,
    containerds: dict[str, Containerd],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there, here = make("web", ["wait"]), make_here("web")
    await run(hosts.s.task, there)
    await hosts.s.task.exec(exec_request(there, "e1", ["wait"]))
    await hosts.s.task.start(pb.StartRequest(id="web", exec_id="e1"))
    await come(hosts, here)
    await finish(hosts)
    assert hosts.destination.server is not None
    sandbox = hosts.destination.server.sandbox
    save = sandbox.containers.save

    async def after_the_end() -> None:
        monkeypatch.undo()
        await sandbox.end(EXIT_KILLED)
        await save()

    monkeypatch.setattr(sandbox.containers, "save", after_the_end)
    await hosts.d.task.exec(exec_request(here, "e1", ["wait"]))
    ended = await hosts.d.task.wait(pb.WaitRequest(id="web-moved", exec_id="e1"), timeout_s=5)
    assert ended.exit_status == EXIT_KILLED
    destination = containerds["destination"]
    await destination.until("/tasks/exit", 2)
    topics = [
        topic
        for topic, event in destination.events()
        if "e1" in (getattr(event, "exec_id", ""), getattr(event, "id", ""))
    ]
    assert topics == ["/tasks/exec-added", "/tasks/exit"]


async def test_an_exec_session_that_could_not_be_written_down_can_be_added_or_bound_again(
    hosts: TwoHosts, make: Make, make_here: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here, out = make("web", ["wait"]), make_here("web"), make_here("exec")
    await run(hosts.s.task, there)

    def full_once(host: FakeHost) -> None:
        assert host.server is not None

        async def full() -> None:
            monkeypatch.undo()
            raise Unavailable("No space left on device")

        monkeypatch.setattr(host.server.sandbox.containers, "save", full)

    full_once(hosts.source)
    with pytest.raises(ttrpc.StatusError, match="No space left"):
        await hosts.s.task.exec(exec_request(there, "e1", ["say", "hi"]))
    await hosts.s.task.exec(exec_request(there, "e1", ["flood"]))
    await hosts.s.task.start(pb.StartRequest(id="web", exec_id="e1"))
    await come(hosts, here)
    await finish(hosts)
    full_once(hosts.destination)
    again = exec_request(here, "e1", ["flood"], stdout=out.stdout.path)
    with pytest.raises(ttrpc.StatusError, match="No space left"):
        await hosts.d.task.exec(again)
    await hosts.d.task.exec(again)
    await hosts.d.task.start(pb.StartRequest(id="web-moved", exec_id="e1"))
    assert await out.stdout.until(MANY)


async def test_what_an_exec_session_said_is_had_although_its_container_ends_before_it_is_bound(
    hosts: TwoHosts, make: Make, make_here: Make
) -> None:
    there, out = make("web", ["wait"]), make("exec", [])
    await run(hosts.s.task, there)
    await hosts.s.task.exec(exec_request(there, "e1", ["flood"], stdout=out.stdout.path))
    await hosts.s.task.start(pb.StartRequest(id="web", exec_id="e1"))
    await out.stdout.until(MANY)
    here, out_here = make_here("web"), make_here("exec")
    await come(hosts, here)
    await finish(hosts)
    await hosts.d.task.kill(pb.KillRequest(id="web-moved", signal=9))
    await hosts.d.task.wait(pb.WaitRequest(id="web-moved"), timeout_s=5)
    with pytest.raises(ttrpc.StatusError, match="exec needs a running one"):
        await hosts.d.task.exec(exec_request(here, "e2", ["wait"]))
    await hosts.d.task.exec(exec_request(here, "e1", ["flood"], stdout=out_here.stdout.path))
    await hosts.d.task.start(pb.StartRequest(id="web-moved", exec_id="e1"))
    first, rest = await out.stdout.all(), await out_here.stdout.all()
    assert rest
    lines(first + rest)


async def test_stdin_reaches_the_process_once_whoever_wrote_it(
    hosts: TwoHosts, make: Make, make_here: Make
) -> None:
    there, here = make("web", ["cat"], stdin=True), make_here("web", stdin=True)
    await run(hosts.s.task, there)
    with there.paths["stdin"].open("wb", buffering=0) as fed:
        await asyncio.to_thread(fed.write, b"one\n")
        await there.stdout.until(4)
    await come(hosts, here)
    await finish(hosts)
    fd = os.open(here.stdin, os.O_WRONLY)
    os.write(fd, b"two\n")
    os.close(fd)
    assert await here.stdout.until(4) == b"two\n"
    assert await there.stdout.all() == b"one\n"


async def test_an_exit_that_nobody_has_heard_of_is_heard_at_the_destination(
    hosts: TwoHosts, make: Make, make_here: Make
) -> None:
    """It ends in the last moment on the source: the agent keeps it."""
    await run(hosts.s.task, make("web", ["wait"]))
    await come(hosts, make_here("web"))
    guest = hosts.destination.process.guest
    guest.containers.signal("web:", 9, 0.0)
    waiting = asyncio.create_task(hosts.d.task.wait(pb.WaitRequest(id="web-moved")))
    await finish(hosts)
    assert (await asyncio.wait_for(waiting, 5)).exit_status == 137


async def test_a_roll_back_goes_on_where_the_source_stopped(
    hosts: TwoHosts, make: Make, make_here: Make, containerds: dict[str, Containerd]
) -> None:
    there, here = make("web", ["flood"]), make_here("web")
    await run(hosts.s.task, there)
    await come(hosts, here)
    await hosts.s.finalize(hosts.session, RESUME)
    await hosts.d.finalize(hosts.session, STOP)
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session), timeout_s=10)
    seen = len(there.stdout.data)
    lines(await there.stdout.until(seen + MANY))
    assert bytes(here.stdout.data) == b""
    ended = await hosts.d.task.wait(pb.WaitRequest(id="web-moved"), timeout_s=5)
    assert ended.exit_status == 255
    assert (await hosts.d.task.delete(pb.DeleteRequest(id="web-moved"))).exit_status == 255
    assert "/tasks/create" not in containerds["destination"].topics
    await hosts.s.task.exec(exec_request(there, "e1", ["wait"]))


async def test_shims_that_are_killed_before_the_decision_lose_and_repeat_nothing(
    hosts: TwoHosts, make: Make, make_here: Make
) -> None:
    there, here = make("web", ["flood"]), make_here("web")
    await run(hosts.s.task, there)
    await come(hosts, here)
    for host in (hosts.source, hosts.destination):
        await host.stop()
        await host.start()
    for reader in (there.stdout, here.stdout):
        reader.read()
    await hosts.reconnect()
    await with_receipts(hosts)
    first = await there.stdout.all()
    assert first
    assert len(lines(first + await here.stdout.until(MANY))) * 9 > len(first) + MANY - 9


async def test_a_destination_that_is_killed_after_it_runs_does_not_repeat_what_it_delivered(
    hosts: TwoHosts, make: Make, make_here: Make
) -> None:
    there, here = make("web", ["flood"]), make_here("web")
    await run(hosts.s.task, there)
    await come(hosts, here)
    await hosts.d.finalize(hosts.session, RESUME)
    await here.stdout.until(MANY)
    here.stdout.hold()
    await hosts.destination.stop()
    await hosts.destination.start()
    await hosts.reconnect()
    await finish(hosts)
    seen = len(here.stdout.data)
    said = await there.stdout.all() + await here.stdout.until(seen + MANY)
    assert len(lines(said)) * 9 == len(said) - len(said) % 9


async def test_a_kill_during_the_brownout_is_let_through_and_ends_the_container(
    hosts: TwoHosts, make: Make
) -> None:
    await run(hosts.s.task, make("web", ["wait"]))
    await hosts.export()
    with pytest.raises(ttrpc.StatusError, match=r"Task\.Delete: sandbox box is in migration session"):
        await hosts.s.task.delete(pb.DeleteRequest(id="web"))
    await hosts.s.task.kill(pb.KillRequest(id="web", signal=9))
    assert (await hosts.s.task.wait(pb.WaitRequest(id="web"), timeout_s=5)).exit_status == 137
