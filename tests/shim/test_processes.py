"""The processes of a sandbox: what they are called, and whose word that is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from sandshift.errors import NotFound, Rejected, Unavailable
from sandshift.guest.client import GuestExit, GuestProcess
from sandshift.shim import processes
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
    known = Processes(tmp_path / "output")
    with pytest.raises(Rejected, match="process id"):
        known.adopt(name, 7, ["/bin/x"], {})
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", ["a", "a.b-c_d", "box:", "box:exec-1"])
async def test_ids_of_processes_and_of_containers_processes_are_taken(tmp_path: Path, name: str) -> None:
    known = Processes(tmp_path / "output")
    assert known.adopt(name, 7, ["/bin/x"], {1: 5}).offsets() == {1: 5, 2: 0}
    assert known.bases_on_disk() == {name: {1: 5, 2: 0}}


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


class FailingGuest:
    """An agent whose output cannot be taken `failures` times: a full disk, or a link that breaks."""

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, 0

    async def follow_output(
        self, _process: str, stream: int, _delivered: Callable[[], int], take: Callable[[int, bytes], int]
    ) -> None:
        self.asked += 1
        take(0, b"first,")
        if self.failures and stream == 1:
            self.failures -= 1
            raise Unavailable("output/job.1.0.log cannot be written: No space left on device")
        take(6, b" and the rest")

    async def wait_process(self, _process: str) -> GuestExit:
        if self.failures:
            self.failures -= 1
            raise Unavailable("the agent's connection has ended")
        return GuestExit(3, 5)


async def test_output_that_could_not_be_taken_is_taken_again_in_the_same_shim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "AGAIN_FIRST_S", 0.001)
    followed = Processes(tmp_path / "output")
    job = followed.adopt("job", 7, ["/bin/job"], {})
    followed.follow(FailingGuest(failures=5))  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        exit_ = await job.exit
        said = [data async for _offset, data in job.outputs[1].read(follow=True)]
    assert (exit_.code, b"".join(said)) == (3, b"first, and the rest")
    assert caplog.text.count("output 1 of job is not followed, which is tried again") == 1
    await followed.let_go()


async def test_a_process_that_the_agent_does_not_know_is_not_asked_for_again(tmp_path: Path) -> None:
    class Ignorant(FailingGuest):
        async def follow_output(self, *_what: object) -> None:
            self.asked += 1
            raise NotFound("there is no process 'job'")

    followed, guest = Processes(tmp_path / "output"), Ignorant(failures=0)
    job = followed.adopt("job", 7, ["/bin/job"], {})
    followed.follow(guest)  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        await asyncio.gather(*job.tasks)
    assert (guest.asked, job.outputs[1].ended) == (2, False)
    await followed.let_go()


class Silent:
    """A guest that stands still."""

    async def follow_output(self, *_what: object, **_how: object) -> None:
        await asyncio.Event().wait()

    async def wait_process(self, _process_id: str) -> GuestExit:
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_shim_that_comes_to_follow_after_the_last_stop_takes_nothing(tmp_path: Path) -> None:
    known = Processes(tmp_path / "output")
    assert known.freeze() == {}
    process = known.adopt("p", 2, ["true"], {})
    assert process.outputs[1].take(0, b"late") == 0
    known.follow(Silent())  # type: ignore[arg-type]
    assert process.outputs[1].take(0, b"late") == 0
    known.thaw()
    assert process.outputs[1].take(0, b"late") == 4
    await known.let_go()
