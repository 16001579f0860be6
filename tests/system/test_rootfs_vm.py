"""Every form in which a snapshotter hands over a root file system, as a container in a real VM sees it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import ttrpc
from sandshift.rootfs import erofs
from sandshift.rootfs.plan import WRITABLE_ANNOTATION
from sandshift.sandbox.model import SOURCE_CONTAINER_ANNOTATION
from sandshift.wire.containerd import mount_pb2
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.containerd.task_ttrpc import TaskClient
from sandshift.wire.migration import messages_pb2 as m
from tests.lab import open_lab
from tests.needs import needs_root
from tests.shim.pod import Bundle, exec_request, run
from tests.system.pair import SESSION, Pair, pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300), needs_root]

NAMESPACES = {
    "linux": {
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}],
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    }
}
LOOK = "cat /what; cat /below 2>/dev/null; echo new > /what && cat /what; grep ' / ' /proc/mounts | head -1"


@pytest_asyncio.fixture
async def hosts() -> AsyncIterator[Pair]:
    async with open_lab() as lab, pair(lab) as made:
        yield made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system of busybox, with a file that says what it is."""
    folder = tmp_path / "root"
    for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
        (folder / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox-static is not installed"
    shutil.copy(busybox, folder / "bin" / "busybox")
    for applet in ("sh", "cat", "echo", "grep", "head", "sleep"):
        (folder / "bin" / applet).symlink_to("busybox")
    (folder / "what").write_text("the root\n")
    (folder / "below").write_text("below\n")
    return folder


def bundle(
    tmp_path: Path, name: str, mounts: list[mount_pb2.Mount], script: str = LOOK, **annotations: str
) -> Bundle:
    process = {
        "args": ["/bin/sh", "-c", script],
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
    }
    spec = {
        **NAMESPACES,
        "process": process,
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    }
    return Bundle(tmp_path / "bundles", name, [], rootfs=mounts, spec=spec, annotations=dict(annotations))


def mount(kind: str, source: Path | str, *options: str) -> mount_pb2.Mount:
    return mount_pb2.Mount(type=kind, source=str(source), options=options)


async def says(hosts: Pair, one: Bundle) -> list[str]:
    """All that a container says, which ends well; it is deleted afterwards."""
    task = TaskClient(hosts.s.client)
    await run(task, one)
    ended = await task.wait(pb.WaitRequest(id=one.container_id), timeout_s=30)
    said = (await one.stdout.all()).decode().splitlines()
    assert ended.exit_status == 0, (said, await one.stderr.all())
    await task.delete(pb.DeleteRequest(id=one.container_id), timeout_s=30)
    one.close()
    return said


def ext4(path: Path, content: Path | None = None) -> Path:
    subprocess.run(["truncate", "-s", "64M", str(path)], check=True)
    filled = ["-d", str(content)] if content else []
    subprocess.run(["mkfs.ext4", "-q", "-F", *filled, str(path)], check=True)
    return path


async def test_overlay_and_bind_are_packed_and_what_is_written_stays_in_the_guest(
    hosts: Pair, root: Path, tmp_path: Path
) -> None:
    top, upper, work = (tmp_path / name for name in ("top", "upper", "work"))
    for folder in (top, upper, work):
        folder.mkdir()
    (top / "what").write_text("the top\n")
    layers = f"lowerdir={top}:{root}"
    overlay = mount("overlay", "overlay", layers, f"upperdir={upper}", f"workdir={work}")
    said = await says(hosts, bundle(tmp_path, "overlay", [overlay]))
    assert said[:3] == ["the top", "below", "new"]
    assert said[3].split()[2] == "overlay"
    native = await says(hosts, bundle(tmp_path, "bind", [mount("bind", root, "rbind", "rw")]))
    assert native[:3] == ["the root", "below", "new"]
    assert (top / "what").read_text() == "the top\n"
    assert (root / "what").read_text() == "the root\n"
    assert list(upper.iterdir()) == []


async def test_a_block_file_is_the_root_itself_and_takes_what_is_written(
    hosts: Pair, root: Path, tmp_path: Path
) -> None:
    file = ext4(tmp_path / "block", root)
    said = await says(hosts, bundle(tmp_path, "block", [mount("ext4", file, "loop", "rw")]))
    assert said[:3] == ["the root", "below", "new"]
    assert said[3].split()[2] == "ext4"
    again = await says(hosts, bundle(tmp_path, "again", [mount("ext4", file, "loop", "rw")], "cat /what"))
    assert again == ["new"]


async def test_layers_that_are_files_are_stacked_by_the_guest(
    hosts: Pair, root: Path, tmp_path: Path
) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / "what").write_text("the top\n")
    layers = []
    for folder in (top, root):
        layers.append(tmp_path / f"{folder.name}.erofs")
        erofs.pack(folder, layers[-1])
    mounts = [
        mount("ext4", ext4(tmp_path / "rwlayer.img"), "rw", "loop"),
        *(mount("erofs", path, "ro", "loop") for path in layers),
        mount(
            "format/mkdir/overlay",
            "overlay",
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 2 }}",
        ),
    ]
    said = await says(hosts, bundle(tmp_path, "files", mounts))
    assert said[:3] == ["the top", "below", "new"]
    assert await says(hosts, bundle(tmp_path, "again", mounts, "cat /what")) == ["new"]


async def test_a_scratch_disk_takes_what_is_written_and_keeps_the_sandbox_here(
    hosts: Pair, root: Path, tmp_path: Path
) -> None:
    native = mount("bind", root, "rbind", "rw")
    disk = {WRITABLE_ANNOTATION: "disk"}
    script = f"{LOOK}; sleep 1000"
    one = bundle(tmp_path, "scratch", [native], script, **disk)
    task = TaskClient(hosts.s.client)
    await run(task, one)
    assert (await one.stdout.until(24)).startswith(b"the root\nbelow\nnew\n")
    scratch = list(Path(hosts.a.config.places.state_dir).rglob("scratch/*.ext4"))
    assert len(scratch) == 1
    request = m.PrepareAndExportSandboxRequest(session_id=SESSION)
    with pytest.raises(ttrpc.StatusError) as refused:
        await hosts.s.migration.prepare_and_export_sandbox(request, timeout_s=30)
    assert refused.value.code is ttrpc.Code.FAILED_PRECONDITION
    assert "scratch" in refused.value.message
    await task.kill(pb.KillRequest(id="scratch", signal=9), timeout_s=10)
    await task.wait(pb.WaitRequest(id="scratch"), timeout_s=30)
    await task.delete(pb.DeleteRequest(id="scratch"), timeout_s=30)
    assert not scratch[0].exists()
    one.close()
    with pytest.raises(ttrpc.StatusError, match=r"annotation io.sandshift.rootfs.writable = 'tape'"):
        await run(task, bundle(tmp_path, "wrong", [native], **{WRITABLE_ANNOTATION: "tape"}))


async def test_layers_that_are_files_are_found_by_content_at_the_destination(
    hosts: Pair, root: Path, tmp_path: Path
) -> None:
    """Other paths, the same bytes: what the guest reads afterwards comes from the destination's files."""
    top = tmp_path / "top"
    top.mkdir()
    (top / "what").write_text("the top\n")
    (root / "unread").write_bytes(b"not read before the move\n" * 4000)
    stacks = []
    for place in ("there", "here"):
        layers = []
        (tmp_path / place).mkdir()
        for folder in (top, root):
            layers.append(tmp_path / place / f"{folder.name}.erofs")
            erofs.pack(folder, layers[-1])
        upper = tmp_path / place / "upper"
        upper.mkdir()
        options = ("lowerdir={{ overlay 0 1 }}", f"upperdir={upper}", f"workdir={tmp_path / place / 'work'}")
        stacks.append(
            [
                *(mount("erofs", path, "ro", "loop") for path in layers),
                mount("format/overlay", "overlay", *options),
            ]
        )
    script = (
        "cat /what; echo mine > /what; while [ ! -e /go ]; do sleep 0.1; done; cat /what /unread | head -2"
    )
    one = bundle(tmp_path, "web", stacks[0], script)
    await run(TaskClient(hosts.s.client), one)
    await one.stdout.until(8)
    moved = bundle(tmp_path, "web-moved", stacks[1], **{SOURCE_CONTAINER_ANNOTATION: "web"})
    other = bundle(tmp_path, "web-other", stacks[1][1:2], **{SOURCE_CONTAINER_ANNOTATION: "web"})
    await hosts.import_config(await hosts.export())
    task = TaskClient(hosts.d.client)
    with pytest.raises(ttrpc.StatusError, match="2 of layer there, 1 here"):
        await run(task, other)
    await run(task, moved)
    shutil.rmtree(tmp_path / "there")
    await hosts.d.migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=SESSION), timeout_s=30)
    await hosts.connect()
    await hosts.complete(hosts.transfers())
    await hosts.finish()
    await task.exec(exec_request(moved, "go", ["/bin/sh", "-c", "echo > /go"]), timeout_s=10)
    await task.start(pb.StartRequest(id="web-moved", exec_id="go"), timeout_s=30)
    assert (await task.wait(pb.WaitRequest(id="web-moved"), timeout_s=30)).exit_status == 0
    assert await moved.stdout.all() == b"mine\nnot read before the move\n"
    await task.delete(pb.DeleteRequest(id="web-moved"), timeout_s=30)
    for each in (one, moved, other):
        each.close()


async def test_what_is_not_known_is_refused_by_name_and_leaves_nothing(
    hosts: Pair, root: Path, tmp_path: Path
) -> None:
    task = TaskClient(hosts.s.client)
    with pytest.raises(ttrpc.StatusError) as refused:
        await run(task, bundle(tmp_path, "btrfs", [mount("btrfs", "/dev/sda1")]))
    assert refused.value.code is ttrpc.Code.INVALID_ARGUMENT
    assert "rootfs[0].source is '/dev/sda1': block devices are not handed on" in refused.value.message
    said = await says(hosts, bundle(tmp_path, "btrfs", [mount("bind", root, "rbind", "rw")], "cat /what"))
    assert said == ["the root"]
