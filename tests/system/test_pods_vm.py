"""Containers in real VMs, as containerd's Task service sees them: run, fed, moved; not a byte lost or repeated."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from sandshift.fleet.shim_client import connect_or_revive
from sandshift.sandbox.model import SOURCE_CONTAINER_ANNOTATION
from sandshift.wire.containerd import cgroup_metrics_pb2, mount_pb2, task_types_pb2
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.containerd.task_ttrpc import TaskClient
from sandshift.wire.migration import messages_pb2 as m
from tests.lab import Lab, open_lab
from tests.needs import needs_root
from tests.shim.pod import Bundle, bundles, exec_request, run
from tests.system.pair import NAMESPACE, RESUME, SANDBOX, SESSION, STOP, Pair, pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300), needs_root]

LINE_BYTES = 9
SPEC = {
    "linux": {
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}],
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    },
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
        },
    ],
}
TALK = "seq -w 0 9999 > /tmp/block; n=0; while :; do printf '%08d\\n' $n; cat /tmp/block; n=$((n+1)); usleep 30000; done"
"""A number and 50 KB that are always the same, again and again: about 1 MB/s where nobody holds it up."""
BLOCK = b"".join(b"%04d\n" % number for number in range(10_000))
MOVED_BYTES = 1 << 20
Make = Callable[..., Bundle]


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[Lab]:
    async with open_lab() as made:
        yield made


@pytest.fixture
def rootfs(tmp_path: Path) -> mount_pb2.Mount:
    """Busybox, as the native snapshotter gives a root file system."""
    folder = tmp_path / "rootfs"
    for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
        (folder / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox-static is not installed"
    shutil.copy(busybox, folder / "bin" / "busybox")
    for applet in subprocess.run(
        [busybox, "--list"], capture_output=True, text=True, check=True
    ).stdout.split():
        if applet != "busybox":
            (folder / "bin" / applet).symlink_to("busybox")
    return mount_pb2.Mount(type="bind", source=str(folder), options=["rbind", "rw"])


@pytest_asyncio.fixture
async def make(tmp_path: Path, rootfs: mount_pb2.Mount) -> AsyncIterator[Make]:
    async with bundles(tmp_path / "there") as made:
        yield lambda name, script, **how: made(
            name,
            ["/bin/sh", "-c", script],
            rootfs=[rootfs],
            spec={
                **SPEC,
                "process": {
                    "args": ["/bin/sh", "-c", script],
                    "cwd": "/",
                    "env": ["PATH=/bin"],
                    "user": {"uid": 0, "gid": 0},
                    "terminal": how.get("terminal", False),
                },
            },
            **how,
        )


@pytest_asyncio.fixture
async def make_here(tmp_path: Path, rootfs: mount_pb2.Mount) -> AsyncIterator[Make]:
    async with bundles(tmp_path / "here") as made:
        yield lambda name, **how: made(
            f"{name}-moved",
            ["/bin/true"],
            rootfs=[rootfs],
            spec=SPEC,
            annotations={SOURCE_CONTAINER_ANNOTATION: name},
            **how,
        )


def tasks(hosts: Pair) -> tuple[TaskClient, TaskClient]:
    return TaskClient(hosts.s.client), TaskClient(hosts.d.client)


def check_talk(data: bytes) -> None:
    """What TALK says, from its first byte on."""
    piece = LINE_BYTES + len(BLOCK)
    wanted = b"".join(b"%08d\n" % number + BLOCK for number in range(len(data) // piece + 1))[: len(data)]
    if data != wanted:
        at = next(index for index in range(len(data)) if data[index] != wanted[index])
        raise AssertionError(
            f"at {at} of {len(data)}: {data[at - 18 : at + 18]!r} in place of {wanted[at - 18 : at + 18]!r}"
        )


def kill_and_wait(pid: int) -> None:
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [], 10)
    os.close(process)


async def move(hosts: Pair, *patches: Bundle) -> None:
    _, destination = tasks(hosts)
    await hosts.import_config(await hosts.export())
    for bundle in patches:
        await run(destination, bundle)
    await hosts.d.migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=SESSION), timeout_s=30)
    await hosts.connect()
    await hosts.complete(hosts.transfers())
    await hosts.finalize(hosts.d, RESUME)
    await hosts.finalize(hosts.s, STOP)
    for shim in (hosts.s, hosts.d):
        await hosts.clean_up(shim)


async def test_a_container_says_hears_and_ends(lab: Lab, make: Make) -> None:
    async with pair(lab) as hosts:
        task, _ = tasks(hosts)
        bundle = make("c1", "echo out; echo err >&2; cat; exit 7", stdin=True)
        pid = await run(task, bundle)
        assert pid > 1
        writer = os.open(bundle.paths["stdin"], os.O_WRONLY)
        os.write(writer, b"through the machine\n")
        assert await bundle.stdout.until(24) == b"out\nthrough the machine\n"
        await task.exec(exec_request(bundle, "e1", ["/bin/sh", "-c", "exit 3"]), timeout_s=10)
        await task.start(pb.StartRequest(id="c1", exec_id="e1"), timeout_s=20)
        assert (await task.wait(pb.WaitRequest(id="c1", exec_id="e1"), timeout_s=20)).exit_status == 3
        await task.close_io(pb.CloseIORequest(id="c1", stdin=True))
        os.close(writer)
        assert (await task.wait(pb.WaitRequest(id="c1"), timeout_s=20)).exit_status == 7
        assert await bundle.stderr.all() == b"err\n"
        await bundle.stdout.all()
        assert (await task.delete(pb.DeleteRequest(id="c1"), timeout_s=20)).exit_status == 7


async def test_three_containers_move_and_their_output_goes_on(lab: Lab, make: Make, make_here: Make) -> None:
    async with pair(lab) as hosts:
        source, destination = tasks(hosts)
        names = ("web", "db", "cache")
        there = [make(name, TALK) for name in names]
        for bundle in there:
            await run(source, bundle)
        await asyncio.gather(*(bundle.stdout.until(MOVED_BYTES) for bundle in there))
        here = [make_here(name) for name in names]
        await move(hosts, *here)
        await asyncio.gather(*(bundle.stdout.until(MOVED_BYTES) for bundle in here))
        for before, after in zip(there, here, strict=True):
            first = await before.stdout.all()
            check_talk(first + bytes(after.stdout.data))
            ended = await source.wait(pb.WaitRequest(id=before.container_id), timeout_s=20)
            assert ended.exit_status == 255
        for bundle in here:
            await destination.kill(pb.KillRequest(id=bundle.container_id, signal=9), timeout_s=10)
            ended = await destination.wait(pb.WaitRequest(id=bundle.container_id), timeout_s=20)
            assert ended.exit_status == 137
            await destination.delete(pb.DeleteRequest(id=bundle.container_id), timeout_s=20)


async def test_exec_sessions_terminals_input_and_exits_move_too(
    lab: Lab, make: Make, make_here: Make
) -> None:
    async with pair(lab) as hosts:
        source, destination = tasks(hosts)
        shell = make(
            "shell",
            "stty -echo; echo up; while read word; do echo got $word; done",
            terminal=True,
            stdin=True,
        )
        await run(source, shell)
        await source.resize_pty(pb.ResizePtyRequest(id="shell", width=90, height=33), timeout_s=10)
        await source.exec(exec_request(shell, "e1", ["/bin/sh", "-c", "sleep 1000; exit 5"]), timeout_s=10)
        pid = (await source.start(pb.StartRequest(id="shell", exec_id="e1"), timeout_s=20)).pid
        brief = make("brief", "read word; exit 42", stdin=True)
        await run(source, brief)
        await shell.stdout.until(4)
        writer = os.open(shell.paths["stdin"], os.O_WRONLY)
        os.write(writer, b"one\n")
        await shell.stdout.until(13)
        here, brief_here = make_here("shell", terminal=True, stdin=True), make_here("brief", stdin=True)
        await move(hosts, here, brief_here)
        os.close(writer)
        state = await destination.state(pb.StateRequest(id="shell-moved", exec_id="e1"), timeout_s=20)
        assert (state.pid, state.status) == (pid, 2)
        writer = os.open(here.paths["stdin"], os.O_WRONLY)
        os.write(writer, b"two\n")
        assert (await here.stdout.until(9)).replace(b"\r", b"") == b"got two\n"
        assert bytes(shell.stdout.data).replace(b"\r", b"") == b"up\ngot one\n"
        os.close(writer)
        await destination.exec(
            exec_request(
                here,
                "e2",
                ["/bin/sh", "-c", "stty size < /proc/1/fd/0; exit 6"],
                stdout=str(brief_here.paths["stdout"]),
            ),
            timeout_s=10,
        )
        await destination.start(pb.StartRequest(id="shell-moved", exec_id="e2"), timeout_s=20)
        ended = await destination.wait(pb.WaitRequest(id="shell-moved", exec_id="e2"), timeout_s=20)
        assert ended.exit_status == 6
        assert await brief_here.stdout.until(6) == b"33 90\n"
        await destination.kill(pb.KillRequest(id="shell-moved", exec_id="e1", signal=15), timeout_s=10)
        ended = await destination.wait(pb.WaitRequest(id="shell-moved", exec_id="e1"), timeout_s=20)
        assert ended.exit_status == 143
        writer = os.open(brief_here.paths["stdin"], os.O_WRONLY)
        os.write(writer, b"done\n")
        os.close(writer)
        ended = await destination.wait(pb.WaitRequest(id="brief-moved"), timeout_s=20)
        assert ended.exit_status == 42


async def test_a_shim_that_is_killed_leaves_its_containers_to_the_next(lab: Lab, make: Make) -> None:
    async with pair(lab) as hosts:
        task, _ = tasks(hosts)
        bundle = make("c1", TALK)
        await run(task, bundle)
        bundle.stdout.hold()
        await bundle.stdout.until(MOVED_BYTES)
        for _ in range(2):
            await asyncio.to_thread(kill_and_wait, (await hosts.s.status()).shim_pid)
            await hosts.s.close()
            hosts.s = await connect_or_revive(hosts.a, NAMESPACE, SANDBOX)
            await bundle.stdout.until(len(bundle.stdout.data) + MOVED_BYTES)
        check_talk(bytes(bundle.stdout.data))
        task, _ = tasks(hosts)
        stats = (await task.stats(pb.StatsRequest(id="c1"), timeout_s=10)).stats
        metrics = cgroup_metrics_pb2.Metrics.FromString(stats.value)
        assert metrics.cpu.usage_usec > 0
        assert metrics.pids.current >= 1
        await task.pause(pb.PauseRequest(id="c1"), timeout_s=10)
        assert (await task.state(pb.StateRequest(id="c1"))).status == task_types_pb2.PAUSED
        await task.resume(pb.ResumeRequest(id="c1"), timeout_s=10)
        await task.kill(pb.KillRequest(id="c1", signal=9, all=True), timeout_s=10)
        assert (await task.wait(pb.WaitRequest(id="c1"), timeout_s=20)).exit_status == 137
        await task.delete(pb.DeleteRequest(id="c1"), timeout_s=20)
