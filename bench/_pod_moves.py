"""A pod of three containers that write without end moves between two hosts while what comes out is read (of the third only
afterwards, so that much is in the guest when it stops); and how fast one container's output comes out. Task service and Migration service, call by call, without containerd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandshift.cli.demo.lab import Lab
from sandshift.sandbox.model import SOURCE_CONTAINER_ANNOTATION
from sandshift.wire.containerd import mount_pb2
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.containerd.task_ttrpc import TaskClient
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o
from tests.shim.pod import Bundle, bundles, run
from tests.system.pair import RESUME, SESSION, STOP, Pair, pair

NAMES = ("web", "db", "cache")
BEFORE_BYTES = 3 << 20
"""Read of each container before the move, and after it."""
BLOCK = b"".join(b"%04d\n" % number for number in range(10_000))
TALK = (
    "seq -w 0 9999 > /tmp/block; n=0; while :; do read up rest < /proc/uptime; "
    "printf '%08d %09d\\n' $n ${up%.*}${up#*.}; cat /tmp/block; n=$((n+1)); done"
)
"""A number, the guest's uptime in hundredths of a second, and 50 KB that are always the same, as fast as they are taken."""
HEAD_BYTES = 19
PIECE_BYTES = HEAD_BYTES + len(BLOCK)
STREAM_MIB = 160
WARM_MIB = 16
SPEC = {
    "linux": {
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}],
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    },
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
}


@dataclass(frozen=True)
class Checked:
    """What both hosts' readers of one container got together."""

    bytes_checked: int
    lost: int
    repeated: int


def check(data: bytes) -> Checked:
    """Hold the output to what TALK says: every piece once, in order, whole."""
    lost = repeated = 0
    for expected, at in enumerate(range(0, len(data), PIECE_BYTES)):
        piece = data[at : at + PIECE_BYTES]
        number = int(piece[:8]) if piece[:8].isdigit() else -1
        whole = piece[HEAD_BYTES:] == BLOCK[: len(piece) - HEAD_BYTES] if len(piece) > HEAD_BYTES else True
        if len(piece) >= 8 and (number != expected or not whole):
            # From here on nothing is in its place: all of the rest counts.
            lost += len(data) - at if number > expected or not whole else 0
            repeated += len(data) - at if 0 <= number < expected else 0
            break
    return Checked(len(data), lost, repeated)


def written_before(data: bytes, first_byte: int, uptime_cs: int) -> int:
    """How many bytes from `first_byte` on belong to pieces that were begun before that uptime, hundredths of a second."""
    count = 0
    for at in range(0, len(data) - PIECE_BYTES, PIECE_BYTES):
        begun_cs = int(
            data[at + PIECE_BYTES + 9 : at + PIECE_BYTES + 18]
        )  # The next piece: then this one was written.
        if begun_cs > uptime_cs:
            break
        count = max(0, at + PIECE_BYTES - first_byte)
    return count


def busybox_root(folder: Path) -> mount_pb2.Mount:
    """A root file system of busybox alone, as the native snapshotter gives it."""
    for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
        (folder / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("busybox-static is not installed: ./run setup vm-tests")
    shutil.copy(busybox, folder / "bin" / "busybox")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in set(applets) - {"busybox"}:
        (folder / "bin" / applet).symlink_to("busybox")
    return mount_pb2.Mount(type="bind", source=str(folder), options=["rbind", "rw"])


@contextlib.asynccontextmanager
async def scene(lab: Lab) -> AsyncIterator[tuple[Pair, Callable[..., Bundle], Callable[..., Bundle]]]:
    """Two hosts, and what makes a container on the first and its like on the second."""
    root = busybox_root(lab.folder / "root")
    async with (
        pair(lab) as hosts,
        bundles(lab.folder / "there") as there,
        bundles(lab.folder / "here") as here,
    ):

        def make(name: str, script: str) -> Bundle:
            process = {
                "args": ["/bin/sh", "-c", script],
                "cwd": "/",
                "env": ["PATH=/bin"],
                "user": {"uid": 0, "gid": 0},
                "terminal": False,
            }
            return there(name, ["/bin/sh"], rootfs=[root], spec={**SPEC, "process": process})

        def make_here(name: str) -> Bundle:
            named = {SOURCE_CONTAINER_ANNOTATION: name}
            return here(f"{name}-moved", ["/bin/true"], rootfs=[root], spec=SPEC, annotations=named)

        try:
            yield hosts, make, make_here
        finally:
            shutil.rmtree(lab.folder / "root", ignore_errors=True)


async def measure_move(lab: Lab) -> dict[str, Any]:
    async with scene(lab) as (hosts, make, make_here):
        source, destination = TaskClient(hosts.s.client), TaskClient(hosts.d.client)
        there = [make(name, TALK) for name in NAMES]
        for bundle in there:
            await run(source, bundle)
        await asyncio.gather(*(bundle.stdout.until(BEFORE_BYTES) for bundle in there))
        here = [make_here(name) for name in NAMES]
        with unread(there[-1]):
            began_s = time.monotonic()
            blackout_ms, resumed_s = await move(hosts, here)
            total_ms = (time.monotonic() - began_s) * 1000
        uptime_cs, asked_s = await guest_uptime(destination, here[0])
        await asyncio.gather(*(bundle.stdout.until(BEFORE_BYTES) for bundle in here))
        stopped_cs = uptime_cs - int((asked_s - resumed_s) * 100)
        checked, unacknowledged = [], 0
        for before, after in zip(there, here, strict=True):
            first = await before.stdout.all()
            data = first + bytes(after.stdout.data)
            checked.append(check(data))
            unacknowledged += written_before(data, len(first), stopped_cs)
    return {
        "total_ms": round(total_ms, 1),
        "blackout_ms": round(blackout_ms, 1),
        "bytes_checked": sum(one.bytes_checked for one in checked),
        "bytes_unacknowledged_at_stop": unacknowledged,
        "bytes_lost": sum(one.lost for one in checked),
        "bytes_repeated": sum(one.repeated for one in checked),
    }


@contextlib.contextmanager
def unread(bundle: Bundle) -> Iterator[None]:
    """A reader that has fallen asleep: fifo, shim and agent fill up until the writer is held."""
    asyncio.get_running_loop().remove_reader(bundle.stdout._fd)
    try:
        yield
    finally:
        bundle.stdout.read()


async def move(hosts: Pair, patches: list[Bundle]) -> tuple[float, float]:
    """The blackout, ms, and when the guest ran again, s of this process's clock."""
    await hosts.import_config(await hosts.export())
    for bundle in patches:
        await run(TaskClient(hosts.d.client), bundle)
    await hosts.d.migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=SESSION), timeout_s=30)
    await hosts.connect()
    await hosts.complete(hosts.transfers())
    told = asyncio.create_task(blackout(hosts))
    resumed_s = (
        time.monotonic()
    )  # Rather too early: the guest has then stopped earlier than it had, and less counts.
    await hosts.finalize(hosts.d, RESUME)
    await hosts.finalize(hosts.s, STOP)
    blackout_ms = await told
    for shim in (hosts.s, hosts.d):
        await hosts.clean_up(shim)
    return blackout_ms, resumed_s


async def blackout(hosts: Pair) -> float:
    async with contextlib.aclosing(hosts.d.notifications(SESSION)) as notifications:
        async for response in notifications:
            if response.notification.phase == o.PHASE_BLACKOUT_EXITED:
                return float(response.notification.blackout_exited.blackout_duration_milliseconds)
    raise SystemExit("the destination did not say how long the blackout was")


async def guest_uptime(task: TaskClient, bundle: Bundle) -> tuple[int, float]:
    """The guest's uptime, hundredths of a second, and when that was, s of this process's clock."""
    path = bundle.folder / "uptime"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        request = pb.ExecProcessRequest(id=bundle.container_id, exec_id="uptime", stdout=str(path))
        request.spec.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process"
        request.spec.value = b'{"args": ["/bin/cat", "/proc/uptime"], "cwd": "/", "env": ["PATH=/bin"]}'
        await task.exec(request, timeout_s=10)
        await task.start(pb.StartRequest(id=bundle.container_id, exec_id="uptime"), timeout_s=30)
        await task.wait(pb.WaitRequest(id=bundle.container_id, exec_id="uptime"), timeout_s=30)
        asked_s = time.monotonic()
        said = b""
        async with asyncio.timeout(10):
            while not said.endswith(b"\n"):
                with contextlib.suppress(BlockingIOError):
                    said += os.read(reading, 100)
                await asyncio.sleep(0.005)
    finally:
        os.close(reading)
    return int(said.split()[0].replace(b".", b"")), asked_s


async def measure_output(lab: Lab) -> dict[str, Any]:
    """One container that writes as fast as it is read, once the guest's code is warm; CPU of shim and VM together."""
    async with scene(lab) as (hosts, make, _):
        task = TaskClient(hosts.s.client)
        bundle = make("stream", f"dd if=/dev/zero bs=65536 count={STREAM_MIB * 16} 2>/dev/null")
        await run(task, bundle)
        await bundle.stdout.until(WARM_MIB << 20)
        pids, began_s, first = await processes(hosts), time.monotonic(), len(bundle.stdout.data)
        spent_s = sum(map(cpu_s, pids))
        data = await bundle.stdout.until(STREAM_MIB << 20)
        took_s, spent_s = time.monotonic() - began_s, sum(map(cpu_s, pids)) - spent_s
        assert data.count(0) == len(data) == STREAM_MIB << 20
        megabytes = (len(data) - first) / 1e6
    return {
        "stdout_mb_per_s": round(megabytes / took_s, 1),
        "stdout_cpu_ms_per_mb": round(spent_s * 1000 / megabytes, 2),
    }


async def processes(hosts: Pair) -> list[int]:
    """The shim and its VM."""
    status = await hosts.s.status()
    return [pid for pid in (status.shim_pid, status.qemu_pid) if pid]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
