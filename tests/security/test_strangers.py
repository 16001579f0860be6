"""Who reaches a shim and what it keeps: its owner and root, and nobody else on the host."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ttrpc
from sandshift.shim.bootstrap import PRIVATE_UMASK
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.sandshift import shim_pb2
from sandshift.wire.sandshift.shim_ttrpc import ShimClient
from tests.needs import needs_root
from tests.security import stranger
from tests.shim.house import TwoHosts, two_hosts

NOBODY_UID, SOMEBODY_UID = stranger.NOBODY_UID, 12345
ASK = """
import asyncio, sys
import ttrpc
from sandshift.wire.sandshift import shim_pb2
from sandshift.wire.sandshift.shim_ttrpc import ShimClient

async def main():
    try:
        client = await ttrpc.connect(sys.argv[1], timeout_s=5)
        answer = await ShimClient(client).status(shim_pb2.StatusRequest(), timeout_s=5)
        print("sandbox", answer.sandbox_id)
    except (OSError, ttrpc.StatusError) as error:
        print(type(error).__name__, getattr(error, "message", error))

asyncio.run(main())
"""


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    """With the umask that the shim's program sets first of all."""
    before = os.umask(PRIVATE_UMASK)
    try:
        async with two_hosts(tmp_path) as both:
            yield both
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """Everything below `folder` that anybody but its owner may touch, and how."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if not path.is_symlink() and mode & 0o077:
            found[str(path.relative_to(folder.parent))] = oct(mode)
    return found


async def test_all_that_a_move_leaves_on_disk_is_its_owner_s_alone(hosts: TwoHosts) -> None:
    sandbox = hosts.source.server.sandbox  # type: ignore[union-attr]
    sandbox.processes.adopt("job", 7, ["/bin/job"], {}).outputs[1].take(0, b"said")
    await hosts.ready()
    places = hosts.source.places
    names = {path.name for path in places.state_dir.iterdir()}
    assert {"session", "session.key", "session.config", "sandbox"} <= names
    roots = [Path(root) for host in (hosts.source, hosts.destination) for root in _roots(host)]
    assert [modes(root) for root in roots] == [{}] * 4
    await hosts.d.finalize(hosts.session, 2)
    await hosts.s.finalize(hosts.session, 1)
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    assert list(places.statements_dir.iterdir())
    assert list(places.reports_dir.iterdir())
    assert [modes(root) for root in roots] == [{}] * 4


def _roots(host) -> tuple[str, str]:  # type: ignore[no-untyped-def]
    return host.config.places.run_dir, host.config.places.state_dir


def end(pid: int) -> None:
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGTERM)
    ended, _, _ = select.select([process], [], [], 10)
    os.close(process)
    assert ended, f"shim {pid} does not end"


@dataclass
class RealShim:
    """The real program, started as `uid` on places that everybody may see; no VM in it."""

    folder: Path
    uid: int
    pid: int

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def socket(self) -> Path:
        return next(self.run_dir.rglob("*.sock"))


@pytest.fixture(params=[0, NOBODY_UID], ids=["root's shim", "a user's shim"])
def shim(request: pytest.FixtureRequest) -> Iterator[RealShim]:
    with stranger.folder_for_everybody() as folder:
        config = folder / "config.toml"
        config.write_text(
            f'[places]\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\ncache_dir = "{folder}/cache"\n'
        )
        folder.chmod(0o777)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "SANDSHIFT_CONFIG": str(config),
            "MAX_SHIM_VERSION": "2",
        }
        command = [
            sys.executable,
            "-m",
            "sandshift.shim.bootstrap",
            "-namespace",
            "test",
            "-id",
            "box",
            "start",
        ]
        subprocess.run(
            command,
            env=environment,
            cwd="/",
            umask=0o000,
            user=request.param,
            group=request.param,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=30,
            check=True,
        )
        record = json.loads(next(folder.rglob("shim.pid")).read_text())
        try:
            yield RealShim(folder, request.param, record["pid"])
        finally:
            end(record["pid"])


@needs_root
async def test_a_shim_s_places_are_closed_whatever_the_umask_of_its_caller(shim: RealShim) -> None:
    assert modes(shim.run_dir) == {}
    assert shim.socket.stat().st_uid == shim.uid
    assert stat.S_IMODE(shim.socket.stat().st_mode) == 0o600


@needs_root
async def test_only_the_owner_and_root_are_answered(shim: RealShim) -> None:
    """First with the places as they are; then as if somebody had opened them: the kernel's word on the peer is asked too."""
    said = await stranger.run(ASK, str(shim.socket), uid=SOMEBODY_UID)
    assert "Permission denied" in said or "FileNotFoundError" in said, said
    for path in (shim.run_dir, *shim.run_dir.rglob("*")):
        path.chmod(0o777)
    said = await stranger.run(ASK, str(shim.socket), uid=SOMEBODY_UID)
    assert said.startswith("ConnectionClosed"), said
    assert (await stranger.run(ASK, str(shim.socket), uid=shim.uid)).strip() == "sandbox box"
    client = await ttrpc.connect(str(shim.socket))
    answer = await ShimClient(client).status(shim_pb2.StatusRequest(), timeout_s=5)
    assert answer.sandbox_id == "box"
    await client.close()
    async with asyncio.timeout(5):
        while "refused" not in next(shim.run_dir.rglob("shim.log")).read_text():
            await asyncio.sleep(0.01)


@needs_root
async def test_a_shim_that_crashes_leaves_no_core_file(shim: RealShim) -> None:
    limits = Path(f"/proc/{shim.pid}/limits").read_text().splitlines()
    core = next(line.split() for line in limits if line.startswith("Max core file size"))
    assert core[4] == "0"
