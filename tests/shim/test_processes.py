"""The processes of a sandbox: what they are called, and whose word that is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandshift.errors import Rejected
from sandshift.guest.client import GuestProcess
from sandshift.shim.processes import Processes
from sandshift.shim.restore import follow_again
from tests.shim.house import FakeGuest, TwoHosts, two_hosts

PATHS = ["../../etc/cron.d/x", "/etc/x", "..", "a/b", "a\0b", ":x", "a:../b", "a:b:c", "x" * 77]


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


@pytest.mark.parametrize("name", PATHS)
async def test_a_process_that_names_a_path_gets_no_file(tmp_path: Path, name: str) -> None:
    processes = Processes(tmp_path / "output")
    with pytest.raises(Rejected, match="process id"):
        processes.adopt(name, 7, ["/bin/x"], {})
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", ["a", "a.b-c_d", "box:", "box:exec-1"])
async def test_ids_of_processes_and_of_containers_processes_are_taken(tmp_path: Path, name: str) -> None:
    processes = Processes(tmp_path / "output")
    assert processes.adopt(name, 7, ["/bin/x"], {1: 5}).offsets() == {1: 5, 2: 0}
    assert processes.bases_on_disk() == {name: {1: 5, 2: 0}}


async def test_a_guest_that_lies_about_its_processes_writes_nowhere_else(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent's list is the guest's word, and after a restart of the shim it is all there is."""
    told = [
        GuestProcess(name, 7, ("/bin/x",), exited=False, exit_code=0, stdout_offset=0, stderr_offset=0)
        for name in ("../../../../evil", "honest")
    ]

    async def list_processes(_guest: FakeGuest) -> list[GuestProcess]:
        return told

    monkeypatch.setattr(FakeGuest, "list_processes", list_processes)
    sandbox = hosts.source.server.sandbox  # type: ignore[union-attr]
    await follow_again(sandbox)
    assert [process.process_id for process in sandbox.processes.all()] == ["honest"]
    assert "a process is not followed: process id '../../../../evil'" in caplog.text
    written = {path.name for path in hosts.source.places.run_dir.parent.rglob("*.log")}
    assert written == {"honest.1.0.log", "honest.2.0.log"}
