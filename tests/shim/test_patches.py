"""Task.Create at the destination: what is supplied for the containers of an imported sandbox, on a real desk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

import ttrpc
from sandshift.errors import AlreadyThere, IllegalMove, NotFound, Unavailable
from sandshift.sandbox.model import Container, Process
from sandshift.sandbox.patching import Mount, Patch
from sandshift.shim.migration.books import Books
from sandshift.shim.migration.desk import Desk
from sandshift.wire.migration import messages_pb2 as m
from tests.shim.house import FakeHost, FakePacker, TwoHosts, two_hosts

CONTAINERS = tuple(
    Container(name, name, pid=pid, processes=(Process(f"{name}:", pid),), started=True)
    for name, pid in (("web", 7), ("db", 9))
)
LAYERED = (replace(CONTAINERS[0], layers=("disk1",)),)
WEB = Patch("web", "new-web", "/b/web", stdout="/f/out")
DB = Patch("db", "new-db", "/b/db")


@pytest_asyncio.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    """Imported at the destination, with two containers; nothing supplied yet."""
    async with two_hosts(tmp_path) as both:
        assert both.source.server is not None
        sandbox = both.source.server.sandbox
        sandbox.frozen_model = lambda: replace(sandbox.model, containers=CONTAINERS)  # type: ignore[method-assign]
        await both.import_config((await both.export()).config)
        yield both


def desk(host: FakeHost) -> Desk:
    assert host.server is not None
    return host.server.desk


async def test_a_patch_answers_the_saved_pid_and_the_same_again_changes_nothing(hosts: TwoHosts) -> None:
    at = desk(hosts.destination)
    assert await at.create_task(WEB) == 7
    assert await at.create_task(WEB) == 7
    assert at.patched_pid("new-web") == 7
    assert at.patched_pid("web") is None
    with pytest.raises(AlreadyThere, match="made with other values: bundle"):
        await at.create_task(replace_struct(WEB, bundle="/b/other"))
    with pytest.raises(NotFound, match="no container cache that is pending a patch; pending: db"):
        await at.create_task(replace_struct(WEB, source_id="cache"))


def replace_struct(patch: Patch, **changes: str) -> Patch:
    return msgspec.structs.replace(patch, **changes)


async def test_preparing_is_refused_with_what_is_pending_and_status_names_it(hosts: TwoHosts) -> None:
    await desk(hosts.destination).create_task(WEB)
    assert list((await hosts.d.status()).session.pending_containers) == ["db"]
    request = m.PrepareSandboxRequest(session_id=hosts.session)
    with pytest.raises(ttrpc.StatusError, match="containers db of the source are pending a patch") as refused:
        await hosts.d.migration.prepare_sandbox(request)
    assert refused.value.code is ttrpc.Code.FAILED_PRECONDITION
    await desk(hosts.destination).create_task(DB)
    await hosts.d.migration.prepare_sandbox(request)
    assert hosts.destination.server is not None
    names = [one.container_id for one in hosts.destination.server.sandbox.model.containers]
    assert names == ["new-web", "new-db"]


async def test_nothing_is_pending_once_no_container_can_be_created_any_more(hosts: TwoHosts) -> None:
    """Whoever waits for the containers would wait in vain."""
    assert list((await hosts.d.status()).session.pending_containers) == ["db", "web"]
    await hosts.d.migration.cancel(m.CancelRequest(session_id=hosts.session))
    assert list((await hosts.d.status()).session.pending_containers) == []


async def test_patches_survive_the_shim(hosts: TwoHosts) -> None:
    await desk(hosts.destination).create_task(WEB)
    await hosts.destination.stop()
    await hosts.destination.start()
    at = desk(hosts.destination)
    assert at.patched_pid("new-web") == 7
    with pytest.raises(AlreadyThere):
        await at.create_task(replace_struct(WEB, stdout="/f/other"))
    assert await at.create_task(DB) == 9


async def test_a_patch_that_cannot_be_written_down_is_none(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_what: object) -> None:
        raise Unavailable("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Books, "note", full)
        with pytest.raises(Unavailable, match="no space left"):
            await desk(hosts.destination).create_task(WEB)
    assert desk(hosts.destination).patched_pid("new-web") is None
    assert await desk(hosts.destination).create_task(WEB) == 7


async def test_the_table_says_when_a_patch_is_taken(hosts: TwoHosts) -> None:
    with pytest.raises(IllegalMove, match=r"SourceExported, which does not take Task\.Create"):
        await desk(hosts.source).create_task(WEB)
    for patch in (WEB, DB):
        await desk(hosts.destination).create_task(patch)
    await hosts.d.finalize(hosts.session, 1)
    with pytest.raises(IllegalMove, match=r"Finalized with STOP, which does not take Task\.Create"):
        await desk(hosts.destination).create_task(WEB)


@pytest_asyncio.fixture
async def layered(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    """Imported at the destination, with a container on a disk of its own."""
    async with two_hosts(tmp_path) as both:
        assert both.source.server is not None
        sandbox = both.source.server.sandbox
        file = await FakePacker().pack_folder(Path("/layers/web"))
        disk = await sandbox.disks.attach("web", file)
        assert disk.device.id == "disk1"
        sandbox.frozen_model = lambda: replace(sandbox.model, containers=LAYERED)  # type: ignore[method-assign]
        await both.import_config((await both.export()).config)
        yield both


def create(bundle: Path, layer: str) -> Patch:
    (bundle / "config.json").write_text('{"ociVersion": "1.1.0"}')
    return Patch("web", "new-web", str(bundle), rootfs=(Mount("bind", f"/elsewhere/{layer}"),))


async def test_the_disks_of_a_container_are_those_of_this_host_by_their_content(
    layered: TwoHosts, tmp_path: Path
) -> None:
    assert await desk(layered.destination).create_task(create(tmp_path, "web")) == 7
    await layered.d.migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=layered.session))
    assert disk1_of(layered) == "/elsewhere/web"


def disk1_of(layered: TwoHosts) -> str:
    """The file behind the layer in the VM that waits at the destination."""
    assert layered.destination.server is not None
    spec = layered.destination.server.sandbox.spec
    assert spec is not None
    return next(str(disk.path) for disk in spec.disks if disk.device_id == "disk1")


async def test_a_layer_of_other_content_is_refused_with_both_digests(
    layered: TwoHosts, tmp_path: Path
) -> None:
    there, here = [(await FakePacker().pack_folder(Path(name))).digest for name in ("web", "other")]
    with pytest.raises(IllegalMove, match=f"layer disk1 is {there} there and {here} here"):
        await desk(layered.destination).create_task(create(tmp_path, "other"))
    assert desk(layered.destination).patched_pid("new-web") is None
    assert await desk(layered.destination).create_task(create(tmp_path, "web")) == 7


async def test_disks_are_known_to_a_later_shim_too(layered: TwoHosts, tmp_path: Path) -> None:
    await desk(layered.destination).create_task(create(tmp_path, "web"))
    await layered.destination.stop()
    await layered.destination.start()
    await layered.d.connection.close()
    layered.d = await layered.destination.client()
    await layered.d.migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=layered.session))
    assert disk1_of(layered) == "/elsewhere/web"


async def test_a_vm_that_could_not_be_made_is_made_with_its_disks_the_next_time(
    layered: TwoHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_spec: object) -> None:
        raise Unavailable("QEMU did not start")

    await desk(layered.destination).create_task(create(tmp_path, "web"))
    request = m.PrepareSandboxRequest(session_id=layered.session)
    with monkeypatch.context() as patched:
        patched.setattr(layered.destination.vmm, "start_incoming", refuse)
        with pytest.raises(ttrpc.StatusError, match="QEMU did not start"):
            await layered.d.migration.prepare_sandbox(request)
    await layered.d.migration.prepare_sandbox(request)
    assert layered.destination.server is not None
    spec = layered.destination.server.sandbox.spec
    assert spec is not None
    assert {disk.device_id: str(disk.path) for disk in spec.disks}["disk1"] == "/elsewhere/web"


async def test_the_id_of_what_an_earlier_import_left_is_taken_until_it_is_deleted(hosts: TwoHosts) -> None:
    await desk(hosts.destination).create_task(WEB)
    for client in (hosts.s, hosts.d):
        await client.migration.cancel(m.CancelRequest(session_id=hosts.session))
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    hosts.session = "session-2"
    await hosts.import_config((await hosts.export()).config)
    with pytest.raises(
        AlreadyThere, match="container new-web is in sandbox box still, from an earlier session"
    ):
        await desk(hosts.destination).create_task(WEB)
    await desk(hosts.destination).sandbox.containers.delete("new-web", "")
    assert await desk(hosts.destination).create_task(WEB) == 7
