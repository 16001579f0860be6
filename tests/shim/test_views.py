"""What a shim shows of its sessions: the active one, the last one, and those of which only a statement is left."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.session.statement import Cell
from sandshift.session.states import Side
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.sandshift import shim_pb2
from tests.shim.house import HostClient, TwoHosts, two_hosts

STOP, RESUME = 1, 2


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


async def shown(client: HostClient, session_id: str = "") -> shim_pb2.SessionStatus:
    answer = await client.shim.status(shim_pb2.StatusRequest(session_id=session_id), timeout_s=10)
    return answer.session


async def end(hosts: TwoHosts, *, forward: bool) -> None:
    order = ((hosts.d, RESUME), (hosts.s, STOP)) if forward else ((hosts.s, RESUME), (hosts.d, STOP))
    for client, action in order:
        await client.finalize(hosts.session, action)
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))


async def test_a_shim_without_a_session_shows_none(hosts: TwoHosts) -> None:
    for session_id in ("", "session-1", "another"):
        assert not (await shown(hosts.s, session_id)).session_id


async def test_the_active_session_is_shown_with_and_without_its_id_and_no_other_is(hosts: TwoHosts) -> None:
    await hosts.prepare()
    for session_id in ("", hosts.session):
        status = await shown(hosts.s, session_id)
        assert (status.session_id, status.state, status.active) == (hosts.session, "SourceExported", True)
        assert (status.side, status.cell, status.action) == (Side.SOURCE.value, Cell.OPEN.value, "")
    assert not (await shown(hosts.s, "another")).session_id


async def test_a_failed_transfer_says_why(hosts: TwoHosts) -> None:
    hosts.source.process.faults.fail_out = "no more pages"
    await hosts.prepare()
    await hosts.connect()
    with pytest.raises(ttrpc.StatusError, match="no more pages"):
        await hosts.s.migration.transfer_sandbox(m.TransferSandboxRequest(session_id=hosts.session))
    assert "no more pages" in (await shown(hosts.s)).failure


@pytest.mark.parametrize(
    ("forward", "source", "destination"),
    [
        (True, (Cell.GONE, "stop"), (Cell.RUNNING, "resume")),
        (False, (Cell.KEPT, "resume"), (Cell.REFUSED, "stop")),
    ],
)
async def test_an_ended_session_says_with_what_it_ended_however_it_is_asked_for(
    hosts: TwoHosts, forward: bool, source: tuple[Cell, str], destination: tuple[Cell, str]
) -> None:
    await hosts.ready()
    await end(hosts, forward=forward)
    for client, (cell, action) in ((hosts.s, source), (hosts.d, destination)):
        for session_id in ("", hosts.session):
            status = await shown(client, session_id)
            assert (status.state, status.active) == ("Idle", False)
            assert (Cell(status.cell), status.action) == (cell, action)
            assert status.receipt


async def test_a_session_before_the_last_is_known_by_its_statement_alone(hosts: TwoHosts) -> None:
    await hosts.ready()
    await end(hosts, forward=False)
    hosts.session = "session-2"
    await hosts.ready()
    for client, cell, action in ((hosts.s, Cell.KEPT, "resume"), (hosts.d, Cell.REFUSED, "stop")):
        status = await shown(client, "session-1")
        assert (status.session_id, status.state, status.active) == ("session-1", "Idle", False)
        assert (Cell(status.cell), status.action) == (cell, action)
    await end(hosts, forward=True)
    assert (await shown(hosts.s)).session_id == "session-2"


async def test_a_report_is_there_for_a_session_that_has_ended_and_for_no_other(hosts: TwoHosts) -> None:
    await hosts.ready()
    await end(hosts, forward=True)
    answer = await hosts.d.shim.report(shim_pb2.ReportRequest(session_id=hosts.session))
    assert b'"action":"resume"' in answer.report.replace(b" ", b"")
    with pytest.raises(ttrpc.StatusError, match="there is no report of session 'another'") as told:
        await hosts.d.shim.report(shim_pb2.ReportRequest(session_id="another"))
    assert told.value.code is ttrpc.Code.NOT_FOUND
