"""The Task service as containerd uses it: every method, and the traps that containerd lays."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import ttrpc
from sandshift.errors import Unavailable
from sandshift.wire.containerd import cgroup_metrics_pb2, task_types_pb2
from sandshift.wire.containerd import task_pb2 as pb
from tests.shim.fake_agent import FakeGuestContainers
from tests.shim.house import SANDBOX, FakeHost, HostClient
from tests.shim.pod import Bundle, Containerd, bundles, exec_request, lines, run

KILL = 9


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
    yield made
    if made.server is not None:
        await made.stop()
    for process in list(made.world.processes.values()):
        process.die()


@pytest.fixture
async def client(host: FakeHost) -> AsyncIterator[HostClient]:
    made = await host.client()
    await made.start_sandbox()
    yield made
    await made.connection.close()


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Bundle]]:
    async with bundles(tmp_path / "bundles") as made:
        yield made


async def status(client: HostClient, name: str, exec_id: str = "") -> str:
    told = await client.task.state(pb.StateRequest(id=name, exec_id=exec_id), timeout_s=5)
    return task_types_pb2.Status.Name(told.status)


async def refused(call: object, code: ttrpc.Code, words: str) -> None:
    with pytest.raises(ttrpc.StatusError, match=words) as caught:
        await call  # type: ignore[misc]
    assert caught.value.code is code


async def test_a_container_runs_from_create_to_delete(client: HostClient, make, containerd: Containerd):
    bundle = make("c1", ["say", "hello"])
    pid = (await client.task.create(bundle.create_request())).pid
    assert await status(client, "c1") == "CREATED"
    assert (await client.task.start(pb.StartRequest(id="c1"))).pid == pid
    ended = await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)
    assert ended.exit_status == 0
    assert ended.HasField("exited_at")
    assert await bundle.stdout.all() == b"hello\n"
    assert await bundle.stderr.all() == b""
    assert await status(client, "c1") == "STOPPED"
    gone = await client.task.delete(pb.DeleteRequest(id="c1"))
    assert (gone.pid, gone.exit_status) == (pid, 0)
    await refused(
        client.task.state(pb.StateRequest(id="c1")), ttrpc.Code.NOT_FOUND, "'c1' is not in sandbox box"
    )
    await containerd.until("/tasks/delete")
    assert containerd.topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


async def test_both_versions_of_the_service_are_served(client: HostClient):
    older = ttrpc.Method(
        "containerd.task.v2.Task", "Connect", ttrpc.Shape.UNARY, pb.ConnectRequest, pb.ConnectResponse
    )
    assert (await client.connection.unary(older, pb.ConnectRequest(id=SANDBOX))).shim_pid > 0


async def test_the_guest_forgets_a_deleted_container_and_its_disks_leave(
    client: HostClient, host: FakeHost, make
):
    await run(client.task, make("c1", ["exit", "3"]))
    inside = host.process.guest.containers
    assert len(host.process.spec.disks) == 2
    await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)
    await client.task.delete(pb.DeleteRequest(id="c1"))
    assert inside.containers == {}
    assert inside.tasks == {}
    assert [disk.device_id for disk in host.process.spec.disks] == ["disk0"]
    assert list(host.places.offsets_dir.iterdir()) == []


async def test_two_containers_of_one_image_share_its_disk(client: HostClient, host: FakeHost, make):
    await run(client.task, make("c1", ["wait"]))
    await run(client.task, make("c2", ["wait"]))
    assert [disk.device_id for disk in host.process.spec.disks] == ["disk0", "disk1"]
    await client.task.kill(pb.KillRequest(id="c1", signal=KILL))
    await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)
    await client.task.delete(pb.DeleteRequest(id="c1"))
    assert [disk.device_id for disk in host.process.spec.disks] == ["disk0", "disk1"]


async def test_the_exit_is_told_after_the_start_however_short_the_life(
    client: HostClient, make, containerd: Containerd
):
    for number in range(20):
        await run(client.task, make(f"c{number}", ["exit", "0"]))
    await containerd.until("/tasks/exit", 20)
    told = [(topic, event.container_id) for topic, event in containerd.events()]
    for number in range(20):
        started, ended = (told.index((f"/tasks/{what}", f"c{number}")) for what in ("start", "exit"))
        assert started < ended


async def test_a_state_never_goes_back_to_running(client: HostClient, make):
    for number in range(20):
        bundle = make(f"c{number}", ["exit", "0"])
        await client.task.create(bundle.create_request())
        await client.task.start(pb.StartRequest(id=bundle.container_id))
        await client.task.wait(pb.WaitRequest(id=bundle.container_id), timeout_s=5)
        assert await status(client, bundle.container_id) == "STOPPED"
        await client.task.delete(pb.DeleteRequest(id=bundle.container_id))


async def test_connect_knows_the_sandbox_too(client: HostClient, host: FakeHost, make):
    pid = await run(client.task, make("c1", ["wait"]))
    sandbox = await client.task.connect(pb.ConnectRequest(id=SANDBOX))
    assert sandbox.task_pid == host.process.pid
    assert (await client.task.connect(pb.ConnectRequest(id="c1"))).task_pid == pid
    await refused(client.task.connect(pb.ConnectRequest(id="other")), ttrpc.Code.NOT_FOUND, "it has: c1")


async def test_pids_name_the_init_until_delete(client: HostClient, host: FakeHost, make):
    pid = await run(client.task, make("c1", ["exit", "9"]))
    await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)
    assert [one.pid for one in (await client.task.pids(pb.PidsRequest(id="c1"))).processes] == [pid]
    sandbox = await client.task.pids(pb.PidsRequest(id=SANDBOX))
    assert [one.pid for one in sandbox.processes] == [host.process.pid]


async def test_pids_say_which_process_is_which_exec_session(client: HostClient, make):
    bundle = make("c1", ["wait"])
    pid = await run(client.task, bundle)
    await client.task.exec(exec_request(bundle, "e1", ["wait"]))
    other = (await client.task.start(pb.StartRequest(id="c1", exec_id="e1"))).pid
    told = (await client.task.pids(pb.PidsRequest(id="c1"))).processes
    names = {one.pid: task_types_pb2.ProcessDetails.FromString(one.info.value).exec_id for one in told}
    assert names == {pid: "", other: "e1"}


async def test_a_killed_container_ends_with_the_signal(client: HostClient, make, containerd: Containerd):
    pid = await run(client.task, make("c1", ["wait"]))
    await client.task.kill(pb.KillRequest(id="c1", signal=15))
    assert (await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)).exit_status == 143
    await containerd.until("/tasks/exit")
    event = containerd.events()[-1][1]
    assert (event.container_id, event.id, event.pid, event.exit_status) == ("c1", "c1", pid, 143)
    await refused(
        client.task.kill(pb.KillRequest(id="c1", signal=9)),
        ttrpc.Code.NOT_FOUND,
        "has no process: it has ended",
    )


async def test_a_running_container_is_not_deleted(client: HostClient, make):
    await run(client.task, make("c1", ["wait"]))
    await refused(
        client.task.delete(pb.DeleteRequest(id="c1")),
        ttrpc.Code.FAILED_PRECONDITION,
        "c1 runs: kill it before",
    )
    assert await status(client, "c1") == "RUNNING"


async def test_a_delete_waits_for_a_reader_and_for_nobody(client: HostClient, make):
    for name, is_read in (("c1", False), ("c2", True)):
        bundle = make(name, ["say", "x" * 1000], reads=False)
        if not is_read:
            bundle.stdout.close()
        await run(client.task, bundle)
        await client.task.wait(pb.WaitRequest(id=name), timeout_s=5)
        deleting = asyncio.create_task(client.task.delete(pb.DeleteRequest(id=name), timeout_s=10))
        done, _ = await asyncio.wait([deleting], timeout=4 if not is_read else 0.3)
        assert bool(done) is not is_read
        if is_read:
            bundle.stdout.read()
            assert await bundle.stdout.all() == b"x" * 1000 + b"\n"
        await deleting


async def test_a_container_that_was_never_started_is_deleted_at_once(
    client: HostClient, host: FakeHost, make
):
    await client.task.create(make("c1", ["wait"]).create_request())
    assert (await client.task.delete(pb.DeleteRequest(id="c1"), timeout_s=5)).exit_status == 137
    assert host.process.guest.containers.tasks == {}


async def test_an_id_is_given_once(client: HostClient, make):
    bundle = make("c1", ["wait"])
    await client.task.create(bundle.create_request())
    await refused(
        client.task.create(bundle.create_request()), ttrpc.Code.ALREADY_EXISTS, "'c1' is in sandbox box"
    )
    assert await status(client, "c1") == "CREATED"


async def test_a_creation_that_fails_leaves_nothing(client: HostClient, host: FakeHost, make, containerd):
    bundle = make("c1", ["missing"])
    await refused(
        client.task.create(bundle.create_request()), ttrpc.Code.NOT_FOUND, "there is no program missing"
    )
    assert [disk.device_id for disk in host.process.spec.disks] == ["disk0"]
    assert host.process.guest.containers.containers == {}
    assert list(host.places.offsets_dir.iterdir()) == []
    await run(client.task, make("c1", ["wait"]))
    assert containerd.topics.count("/tasks/create") <= 1


@pytest.mark.parametrize(
    ("stdout", "code", "words"),
    [
        ("binary:///usr/bin/logger", ttrpc.Code.UNIMPLEMENTED, "not to binary://"),
        ("relative/path", ttrpc.Code.INVALID_ARGUMENT, "the path must be absolute"),
        ("/nowhere/at/all", ttrpc.Code.UNAVAILABLE, "fifo /nowhere/at/all cannot be opened"),
    ],
)
async def test_stdio_that_cannot_be_is_refused_by_name(
    client: HostClient, host: FakeHost, make, stdout, code, words
):
    request = make("c1", ["wait"]).create_request()
    request.stdout = stdout
    await refused(client.task.create(request), code, re.escape(words))
    assert host.process.guest.containers.containers == {}


async def test_an_exec_session_lives_beside_the_init(
    client: HostClient, make, containerd: Containerd, tmp_path: Path
):
    bundle = make("c1", ["wait"])
    await run(client.task, bundle)
    other = make("exec", [])
    await client.task.exec(exec_request(bundle, "e1", ["say", "hi"], stdout=str(other.paths["stdout"])))
    assert await status(client, "c1", "e1") == "CREATED"
    pid = (await client.task.start(pb.StartRequest(id="c1", exec_id="e1"))).pid
    assert (await client.task.wait(pb.WaitRequest(id="c1", exec_id="e1"), timeout_s=5)).exit_status == 0
    assert await other.stdout.all() == b"hi\n"
    gone = await client.task.delete(pb.DeleteRequest(id="c1", exec_id="e1"))
    assert (gone.pid, gone.exit_status) == (pid, 0)
    await refused(
        client.task.state(pb.StateRequest(id="c1", exec_id="e1")),
        ttrpc.Code.NOT_FOUND,
        "no exec session 'e1'",
    )
    assert await status(client, "c1") == "RUNNING"
    await containerd.until("/tasks/exit")
    assert containerd.topics == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
    ]
    assert containerd.events()[-1][1].id == "e1"


async def test_exec_needs_a_running_container_and_a_free_id(client: HostClient, make):
    bundle = make("c1", ["wait"])
    await client.task.create(bundle.create_request())
    await refused(
        client.task.exec(exec_request(bundle, "e1", ["wait"])),
        ttrpc.Code.FAILED_PRECONDITION,
        "c1 is created",
    )
    await client.task.start(pb.StartRequest(id="c1"))
    await client.task.exec(exec_request(bundle, "e1", ["wait"]))
    await refused(
        client.task.exec(exec_request(bundle, "e1", ["wait"])),
        ttrpc.Code.ALREADY_EXISTS,
        "exec session 'e1' already",
    )
    assert await status(client, "c1") == "RUNNING"
    assert await status(client, "c1", "e1") == "CREATED"


async def test_when_the_init_ends_its_exec_sessions_end(client: HostClient, make, containerd: Containerd):
    bundle = make("c1", ["wait"])
    await run(client.task, bundle)
    await client.task.exec(exec_request(bundle, "e1", ["wait"]))
    await client.task.start(pb.StartRequest(id="c1", exec_id="e1"))
    await client.task.kill(pb.KillRequest(id="c1", signal=KILL))
    assert (await client.task.wait(pb.WaitRequest(id="c1", exec_id="e1"), timeout_s=5)).exit_status == 137
    await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)
    await client.task.delete(pb.DeleteRequest(id="c1"))
    await containerd.until("/tasks/exit", 2)


async def test_who_waits_for_an_exec_session_that_is_never_started_hears_when_its_container_is_deleted(
    client: HostClient, make, containerd: Containerd
):
    """Clients wait before they start, so as to miss no end."""
    bundle = make("c1", ["wait"])
    await run(client.task, bundle)
    await client.task.exec(exec_request(bundle, "e1", ["wait"]))
    waiting = asyncio.create_task(client.task.wait(pb.WaitRequest(id="c1", exec_id="e1"), timeout_s=20))
    await client.task.kill(pb.KillRequest(id="c1", signal=KILL))
    await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)
    await client.task.delete(pb.DeleteRequest(id="c1"), timeout_s=5)
    assert (await asyncio.wait_for(waiting, 5)).exit_status == 0
    await containerd.until("/tasks/delete")
    assert containerd.topics.count("/tasks/exit") == 1, "what never ran has no end to tell"


async def test_a_start_that_failed_is_no_start_for_the_next_shim_either(
    client: HostClient, host: FakeHost, make, monkeypatch: pytest.MonkeyPatch
):
    await client.task.create(make("c1", ["wait"]).create_request())

    async def fails(_containers: object, _container_id: str) -> None:
        raise Unavailable("the agent did not answer")

    with monkeypatch.context() as patched:
        patched.setattr(FakeGuestContainers, "start", fails)
        await refused(client.task.start(pb.StartRequest(id="c1")), ttrpc.Code.UNAVAILABLE, "did not answer")
    await client.connection.close()
    await host.stop()
    await host.start()
    again = await host.client()
    assert await status(again, "c1") == "CREATED"
    await again.task.start(pb.StartRequest(id="c1"))
    assert await status(again, "c1") == "RUNNING"
    await again.connection.close()


@pytest.mark.parametrize(
    ("linux", "words"),
    [([1], r"linux: \[1\] is no JSON object"), ({"namespaces": ["x"]}, "linux.namespaces")],
    ids=["a list", "a word for a namespace"],
)
async def test_a_first_container_whose_spec_is_none_is_refused_before_there_is_a_vm(
    host: FakeHost, make, linux: object, words: str
):
    bundle = make("c1", ["wait"])
    path = Path(bundle.create_request().bundle) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "linux": linux}))
    client = await host.client()
    await refused(client.task.create(bundle.create_request()), ttrpc.Code.INVALID_ARGUMENT, words)
    assert host.world.processes == {}
    await client.connection.close()


async def test_a_paused_container_stands_still(client: HostClient, make, containerd: Containerd):
    bundle = make("c1", ["count", "1000"])
    await run(client.task, bundle)
    await bundle.stdout.until(900)
    await client.task.pause(pb.PauseRequest(id="c1"))
    assert await status(client, "c1") == "PAUSED"
    await refused(client.task.pause(pb.PauseRequest(id="c1")), ttrpc.Code.FAILED_PRECONDITION, "c1 is paused")
    await client.task.resume(pb.ResumeRequest(id="c1"))
    assert await status(client, "c1") == "RUNNING"
    await containerd.until("/tasks/resumed")
    assert containerd.topics[-2:] == ["/tasks/paused", "/tasks/resumed"]


async def test_stats_come_as_containerd_reads_them(client: HostClient, make):
    await run(client.task, make("c1", ["wait"]))
    told = (await client.task.stats(pb.StatsRequest(id="c1"))).stats
    assert told.type_url == "io.containerd.cgroups.v2.Metrics"
    metrics = cgroup_metrics_pb2.Metrics.FromString(told.value)
    assert (metrics.cpu.usage_usec, metrics.memory.usage, metrics.pids.current) == (1000, 1 << 20, 1)
    assert metrics.memory.usage_limit == (1 << 64) - 1


async def test_limits_are_changed_in_the_guest(client: HostClient, host: FakeHost, make):
    await run(client.task, make("c1", ["wait"]))
    request = pb.UpdateTaskRequest(id="c1")
    request.resources.value = b'{"memory": {"limit": 1048576}}'
    await client.task.update(request)
    assert host.process.guest.containers.containers["c1"].resources == '{"memory":{"limit":1048576}}'


async def test_a_terminal_is_one_stream_and_has_a_size(client: HostClient, host: FakeHost, make):
    bundle = make("c1", ["count", "500"], terminal=True, stdin=True)
    await run(client.task, bundle)
    await client.task.resize_pty(pb.ResizePtyRequest(id="c1", width=132, height=50))
    task = host.process.guest.containers.tasks["c1:"]
    assert task.size == (132, 50)
    assert list(task.streams) == [1]
    lines(await bundle.stdout.until(90))
    await run(client.task, make("c2", ["wait"]))
    await refused(
        client.task.resize_pty(pb.ResizePtyRequest(id="c2", width=1, height=1)),
        ttrpc.Code.FAILED_PRECONDITION,
        "c2 has no terminal",
    )


async def test_what_a_vm_cannot_do_is_said_by_code(client: HostClient, make):
    await run(client.task, make("c1", ["wait"]))
    await refused(
        client.task.checkpoint(pb.CheckpointTaskRequest(id="c1", path="/x")),
        ttrpc.Code.UNIMPLEMENTED,
        "move the whole sandbox with sandshift migrate",
    )
    request = make("c2", ["wait"]).create_request()
    request.checkpoint = "/x"
    await refused(client.task.create(request), ttrpc.Code.UNIMPLEMENTED, "cannot be made from a checkpoint")


async def test_shutdown_does_nothing_while_a_sandbox_of_the_sandbox_service_lives(
    client: HostClient, host: FakeHost
):
    await client.task.shutdown(pb.ShutdownRequest(id=SANDBOX, now=True))
    assert host.process.alive
    assert not host.server.shut_down.is_set()


async def test_without_a_sandbox_the_first_container_brings_one_and_the_last_takes_it_away(
    host: FakeHost, make
):
    client = await host.client()
    bundle = make(SANDBOX, ["say", "alone"])
    await run(client.task, bundle)
    assert host.process.alive
    assert await bundle.stdout.all() == b"alone\n"
    await client.task.wait(pb.WaitRequest(id=SANDBOX), timeout_s=5)
    await client.task.shutdown(pb.ShutdownRequest(id=SANDBOX))
    assert not host.server.shut_down.is_set(), "a container is left"
    await client.task.delete(pb.DeleteRequest(id=SANDBOX))
    await client.task.shutdown(pb.ShutdownRequest(id=SANDBOX))
    assert not host.world.processes[host.places.vm_dir].alive
    assert not host.server.shut_down.is_set(), "the caller hears the answer first"
    async with asyncio.timeout(15):
        await host.server.shut_down.wait()
    await client.connection.close()


async def test_out_of_memory_is_told(client: HostClient, host: FakeHost, make, containerd: Containerd):
    await run(client.task, make("c1", ["wait"]))
    host.process.guest.containers.oom.append((1, "c1", 5))
    await containerd.until("/tasks/oom")
    assert containerd.events()[-1][1].container_id == "c1"


async def test_a_vm_that_dies_ends_its_containers(
    client: HostClient, host: FakeHost, make, containerd: Containerd
):
    bundle = make("c1", ["count"])
    await run(client.task, bundle)
    host.process.die()
    assert (await client.task.wait(pb.WaitRequest(id="c1"), timeout_s=5)).exit_status == 137
    await bundle.stdout.all()
    assert (await client.task.delete(pb.DeleteRequest(id="c1"))).exit_status == 137
    await containerd.until("/tasks/delete")
