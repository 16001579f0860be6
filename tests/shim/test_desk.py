"""Where calls meet their session: what changes the sandbox and what moves it never happen at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest

import ttrpc
from sandshift.config import Limits
from sandshift.sandbox import codec
from sandshift.session import saved
from sandshift.session.ids import SessionId
from sandshift.shim.migration import desk
from sandshift.shim.migration.desk import Desk
from sandshift.shim.serve import ShimServer
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.sandshift import shim_pb2
from tests.shim.house import SANDBOX, FakeGuest, TwoHosts, two_hosts

FP = ttrpc.Code.FAILED_PRECONDITION


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


class SlowGuest:
    """The agent takes its time to start a process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.starting, self.may_answer = asyncio.Event(), asyncio.Event()
        monkeypatch.setattr(FakeGuest, "start_process", self._start)

    async def _start(self, *_what: object, **_more: object) -> int:
        self.starting.set()
        await self.may_answer.wait()
        return 7


def desk_of(hosts: TwoHosts, side: Literal["source", "destination"] = "source") -> Desk:
    server = getattr(hosts, side).server
    assert isinstance(server, ShimServer)
    return server.desk


def run(hosts: TwoHosts, process_id: str) -> asyncio.Task[shim_pb2.RunProcessResponse]:
    request = shim_pb2.RunProcessRequest(process_id=process_id, args=["/bin/job"])
    return asyncio.create_task(hosts.s.shim.run_process(request, timeout_s=10))


async def begins(hosts: TwoHosts) -> None:
    async with asyncio.timeout(5):
        while not desk_of(hosts)._beginning:
            await asyncio.sleep(0.001)


def processes_in(config: object, session_id: str) -> list[str]:
    state = saved.decode(config, expected=SessionId(session_id))  # type: ignore[arg-type]
    return [process.process_id for process in codec.sandbox_from_proto(state.sandbox).processes]


async def test_a_process_that_is_being_started_is_in_the_saved_state(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = SlowGuest(monkeypatch)
    running = run(hosts, "job")
    await guest.starting.wait()
    exporting = asyncio.create_task(hosts.export())
    await begins(hosts)
    assert not exporting.done()
    guest.may_answer.set()
    assert (await running).pid == 7
    assert processes_in((await exporting).config, hosts.session) == ["job"]


async def test_a_process_whose_caller_went_away_is_in_the_saved_state_too(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = SlowGuest(monkeypatch)
    running = run(hosts, "job")
    await guest.starting.wait()
    other = await hosts.source.client()
    await hosts.s.connection.close()
    await asyncio.gather(running, return_exceptions=True)
    hosts.s = other
    guest.may_answer.set()
    assert processes_in((await hosts.export()).config, hosts.session) == ["job"]


async def test_nothing_begins_to_change_the_sandbox_once_a_session_is_to_begin(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = SlowGuest(monkeypatch)
    running = run(hosts, "job")
    await guest.starting.wait()
    exporting = asyncio.create_task(hosts.export())
    await begins(hosts)
    stop = sandbox_pb2.StopSandboxRequest(sandbox_id=SANDBOX)
    for change in (run(hosts, "late"), hosts.s.sandbox.stop_sandbox(stop, timeout_s=5)):
        with pytest.raises(
            ttrpc.StatusError, match="a migration session of sandbox box is about to begin"
        ) as told:
            await change
        assert told.value.code is FP
    guest.may_answer.set()
    await running
    await exporting
    with pytest.raises(ttrpc.StatusError, match="is in migration session 'session-1'"):
        await run(hosts, "later")


async def test_a_sandbox_that_is_being_stopped_does_not_move(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    powering_off, go_on = asyncio.Event(), asyncio.Event()

    async def power_off(guest: FakeGuest) -> None:
        powering_off.set()
        await go_on.wait()
        guest._process.power_off()

    monkeypatch.setattr(FakeGuest, "power_off", power_off)
    request = sandbox_pb2.StopSandboxRequest(sandbox_id=SANDBOX, timeout_secs=10)
    stopping = asyncio.create_task(hosts.s.sandbox.stop_sandbox(request, timeout_s=20))
    await powering_off.wait()
    exporting = asyncio.create_task(hosts.export())
    await begins(hosts)
    go_on.set()
    await stopping
    with pytest.raises(ttrpc.StatusError, match="it is stopped") as told:
        await exporting
    assert told.value.code is FP
    assert not desk_of(hosts)._beginning


async def test_a_session_that_could_not_begin_is_in_nobody_s_way(hosts: TwoHosts) -> None:
    hosts.source.process.stop()
    with pytest.raises(ttrpc.StatusError, match="resume it first"):
        await hosts.export()
    hosts.source.process.start()
    assert (await run(hosts, "job")).pid == 2
    await hosts.export()
    await hosts.s.finalize(hosts.session, 2)
    await hosts.s.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    assert (await run(hosts, "job-2")).pid == 2


async def test_a_change_that_does_not_end_holds_no_session_up_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_hosts(tmp_path, Limits(agent_reply_s=0.2)) as hosts:
        guest = SlowGuest(monkeypatch)
        running = run(hosts, "job")
        await guest.starting.wait()
        with pytest.raises(
            ttrpc.StatusError, match=r"RunProcess of sandbox box goes on for more than 0\.2 s"
        ) as told:
            await hosts.export()
        assert told.value.code is ttrpc.Code.UNAVAILABLE
        guest.may_answer.set()
        await running
        assert processes_in((await hosts.export()).config, hosts.session) == ["job"]


async def test_a_session_that_was_finalized_and_never_cleaned_up_lets_its_sandbox_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orchestrator that dies between Finalize and Cleanup would leave a guest in which nothing can be started."""
    monkeypatch.setattr(desk, "ORPHAN_LOOK_S", 0.05)
    async with two_hosts(tmp_path, Limits(orphan_s=0.5)) as hosts:
        await hosts.ready()
        await hosts.d.finalize(hosts.session, 2)
        await hosts.s.finalize(hosts.session, 1)
        async with asyncio.timeout(5):
            while desk_of(hosts, "destination").active is not None or desk_of(hosts).active is not None:
                await asyncio.sleep(0.05)
        for client in (hosts.d, hosts.s):
            await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
        request = shim_pb2.RunProcessRequest(process_id="job", args=["/bin/job"])
        assert (await hosts.d.shim.run_process(request, timeout_s=10)).pid > 0
