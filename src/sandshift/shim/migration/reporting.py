"""The report of a session, put together from what its side has seen (`session/report.py` says what it holds)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandshift.session import phases
from sandshift.session import report as reports

if TYPE_CHECKING:
    from sandshift.session.blackout import Blackout, Split
    from sandshift.shim.migration.pacing import Pacer
    from sandshift.shim.migration.side import SessionSide


def report_of(
    side: SessionSide,
    *,
    blackout: Blackout | None,
    pieces: Split,
    pacer: Pacer | None = None,
    checksum: reports.ChecksumReport | None = None,
    clock_skew_ms: float | None = None,
) -> reports.Report:
    """This side's report, as of now."""
    session, opened = side.session, side.books.state.opened
    assert opened is not None
    record = session.party.record
    entries = session.record.entries
    started_us = next((entry.started_at_us for entry in entries if entry.started_at_us), 0)
    ending = session.record.ending
    shape = side.machine_shape
    outcome = side.outcome
    return reports.Report(
        session_id=session.session_id,
        sandbox_id=side.sandbox.sandbox_id,
        side=session.side.word,
        host=side.sandbox.config.host_name,
        outcome=outcome.value if outcome is not None else "none",
        action=record.action.word if record.action else "none",
        began_at_us=opened.opened_at_us,
        ended_at_us=side.sandbox.clock_us(),
        code=phases.code(outcome, session.side) if outcome is not None else 0,
        failure=ending.failure.message if ending is not None and ending.failure is not None else "",
        forced=record.forced,
        transfer_ms=(ending.updated_at_us - started_us) / 1000 if ending is not None and started_us else None,
        encrypted=side.books.encrypted,
        accelerator=shape.accelerator if shape else "",
        qemu_version=shape.qemu_version if shape else "",
        memory_bytes=shape.memory_bytes if shape else 0,
        bytes_transferred=pacer.bytes_transferred if pacer else 0,
        passes=pacer.pass_reports() if pacer else reports.passes_of(entries),
        phases=reports.phases_of(entries),
        blackout=reports.blackout_of(blackout, pieces),
        clock_skew_ms=clock_skew_ms,
        options=reports.options_of(side.options),
        plan=reports.plan_of(pacer.plan) if pacer else {},
        rules=tuple(pacer.said) if pacer else (),
        checksum=checksum,
        timeline=tuple(side.moments) if side.options.perf_tracing else (),
        warnings=tuple(session.warnings),
    )
