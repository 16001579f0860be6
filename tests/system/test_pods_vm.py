"""Containers in real VMs, as containerd's Task service sees them: run, fed, moved; not a byte lost or repeated."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from sandshift.sandbox.model import SOURCE_CONTAINER_ANNOTATION
from sandshift.wire.containerd import mount_pb2
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.containerd.task_ttrpc import TaskClient
from sandshift.wire.migration import messages_pb2 as m
from tests.lab import Lab, open_lab
from tests.needs import needs_root
from tests.shim.pod import Bundle, bundles, exec_request, run
from tests.system.pair import RESUME, SESSION, STOP, Pair, pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300), needs_root]

LINE_BYTES = 9
SPEC = {
    "linux": {
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}],
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    },
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
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
            ended = await source.wait(pb.WaitRequest(id=before.container_id), timeout_s=5)
            assert ended.exit_status == 255
        for bundle in here:
            await destination.kill(pb.KillRequest(id=bundle.container_id, signal=9), timeout_s=10)
            ended = await destination.wait(pb.WaitRequest(id=bundle.container_id), timeout_s=20)
            assert ended.exit_status == 137
            await destination.delete(pb.DeleteRequest(id=bundle.container_id), timeout_s=20)
