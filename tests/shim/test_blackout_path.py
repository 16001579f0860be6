"""What the guest does not have to wait for: a question to QEMU, a note, a figure for the report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.shim.migration import patience
from sandshift.shim.migration.destination import Destination
from sandshift.shim.migration.source import Source
from sandshift.vmm.machine import MigrationInfo
from tests.shim.house import FakeHost, TwoHosts, two_hosts

RESUME, STOP = 2, 1


class CountingHaste:
    def __init__(self) -> None:
        self.on = False
        self.told: list[str] = []

    def begin(self) -> None:
        self.on = True
        self.told.append("begin")

    def end(self) -> None:
        self.on = False
        self.told.append("end")


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


def active_on(host: FakeHost) -> Source | Destination:
    assert host.server is not None
    active = host.server.desk.active
    assert active is not None
    return active


def with_haste(host: FakeHost) -> CountingHaste:
    haste = CountingHaste()
    object.__setattr__(active_on(host).sandbox.parts, "haste", haste)
    return haste


async def test_the_switchover_does_not_wait_for_qemus_answer_to_a_look(hosts: TwoHosts) -> None:
    await hosts.prepare()
    source = active_on(hosts.source)
    machine = source.sandbox.require_machine()
    asked, answer = asyncio.Event(), asyncio.Event()
    info = machine.migration_info

    async def not_before_the_end() -> MigrationInfo:
        asked.set()
        await answer.wait()
        return await info()

    machine.migration_info = not_before_the_end  # type: ignore[method-assign]
    await hosts.connect()
    await hosts.transfer()
    assert asked.is_set(), "the passes were looked at"
    answer.set()
    assert source.session.party.complete


async def test_the_report_has_qemus_own_sums_though_nobody_asked_in_the_blackout(hosts: TwoHosts) -> None:
    await hosts.ready()
    source = active_on(hosts.source)
    assert isinstance(source, Source)
    await hosts.d.finalize(hosts.session, RESUME)
    wanted = await source.sandbox.require_machine().migration_info()
    await hosts.s.finalize(hosts.session, STOP)
    report = source.report()
    assert report.bytes_transferred == wanted.ram_transferred_bytes > 0
    assert report.passes[-1].number == wanted.passes
    assert report.passes[-1].bytes_remaining == 0


async def test_a_phase_that_was_told_is_not_written_again(hosts: TwoHosts) -> None:
    await hosts.ready()
    source = active_on(hosts.source)
    entries = source.session.record.entries
    written: list[object] = []
    source.books.write_entry = written.append  # type: ignore[method-assign]
    assert isinstance(source, Source)
    source.tell_success()
    assert written == []
    assert source.session.record.entries == entries


async def test_the_reports_name_both_ends_of_the_blackout_by_the_vms_stamps(hosts: TwoHosts) -> None:
    await hosts.ready()
    source, there = active_on(hosts.source), active_on(hosts.destination)
    await hosts.d.finalize(hosts.session, RESUME)
    stopped, resumed = source.report().blackout.stopped_at_us, there.report().blackout.resumed_at_us
    assert stopped is not None
    assert resumed is not None
    lasted_ms = (resumed - stopped) / 1000
    assert 0 < lasted_ms < 60_000
    assert source.report().blackout.resumed_at_us is None
    assert there.report().blackout.stopped_at_us is None


async def test_both_shims_hurry_until_the_guest_runs_and_not_longer(hosts: TwoHosts) -> None:
    await hosts.prepare()
    source, there = with_haste(hosts.source), with_haste(hosts.destination)
    await hosts.connect()
    await hosts.transfer()
    assert (source.on, there.on) == (True, True)
    await hosts.d.finalize(hosts.session, RESUME)
    assert (source.on, there.on) == (True, False), "the guest has the destination for itself"
    await hosts.s.finalize(hosts.session, STOP)
    await active_on(hosts.source).close()
    assert (source.on, there.on) == (False, False)


async def test_a_transfer_that_failed_needs_no_haste_any_more(hosts: TwoHosts) -> None:
    await hosts.prepare()
    source, there = with_haste(hosts.source), with_haste(hosts.destination)
    hosts.source.process.faults.fail_out = "no more pages"
    await hosts.connect()
    with pytest.raises(ttrpc.StatusError, match="the transfer failed"):
        await hosts.transfer()
    await asyncio.wait_for(active_on(hosts.destination).session.transfer.done, 10)
    assert source.told[-1] == there.told[-1] == "end"


async def test_a_way_that_was_never_measured_counts_as_none(
    hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "tcp_info", lambda *_: 0xFFFF_FFFF)
    await hosts.ready()
    await hosts.d.finalize(hosts.session, RESUME)
    blackout = active_on(hosts.destination).report().blackout
    assert blackout.method == "pieces"
    assert blackout.error_ms == 2.0, "a busy source's, and no way"
