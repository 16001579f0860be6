"""The report of a finished session: what happened, in numbers, for a machine; and the same for a person.

Each side writes its own (docs/reference/report.md). It is JSON: fields are added, never changed or removed, and
`schema` counts changes that a reader must know of. It holds no secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from sandshift.errors import Damaged
from sandshift.session.blackout import Blackout, Split
from sandshift.session.options import Options
from sandshift.session.precopy import Plan
from sandshift.session.record import Entry

SCHEMA: Final = 1
WARNINGS_MAX: Final = 100
TIMELINE_MAX: Final = 2000
PASSES_MAX: Final = 1000
_MIB: Final = 1 << 20


class PassReport(msgspec.Struct, frozen=True, kw_only=True):
    """What QEMU said at the last look in a pass."""

    number: int
    at_ms: float
    """Since the transfer started."""
    bytes_transferred: int
    """In all, up to then."""
    bytes_remaining: int
    dirty_bytes_per_s: int = 0
    bytes_per_s: int = 0
    throttle_percent: int = 0


class PhaseReport(msgspec.Struct, frozen=True, kw_only=True):
    phase: str
    state: str
    at_us: int
    """This host's clock, microseconds since the epoch."""
    lasted_ms: float | None = None
    """Until the next phase; null for the last."""


class BlackoutReport(msgspec.Struct, frozen=True, kw_only=True):
    """Null where this side cannot know: only the destination knows the whole, each side its pieces."""

    duration_ms: float | None = None
    error_ms: float | None = None
    method: str | None = None
    stop_ms: float | None = None
    last_pass_ms: float | None = None
    device_state_ms: float | None = None
    handover_ms: float | None = None
    resume_ms: float | None = None
    stopped_at_us: int | None = None
    """QEMU's STOP (source)."""
    resumed_at_us: int | None = None
    """QEMU's RESUME (destination)."""


class ChecksumReport(msgspec.Struct, frozen=True, kw_only=True):
    """Of checksum_verification."""

    took_ms: float
    """How long this side's memory took to hash, in the blackout."""
    matched: bool | None = None
    """Known to the destination only."""


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """Of perf_tracing_enabled: something that happened."""

    at_ms: float
    """Since the transfer started."""
    what: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    session_id: str
    sandbox_id: str
    side: str
    """"source" or "destination"."""
    host: str
    outcome: str
    """How the transfer ended: see session/phases.py, Outcome. "none": it never began."""
    action: str
    """How the session was finalized: "stop", "resume", "none"."""
    began_at_us: int
    """This host's clock, microseconds since the epoch."""
    ended_at_us: int
    schema: int = SCHEMA
    code: int = 0
    """gRPC's, of the transfer."""
    failure: str = ""
    forced: bool = False
    """An operator took the right to run by force."""
    transfer_ms: float | None = None
    encrypted: bool | None = None
    accelerator: str = ""
    qemu_version: str = ""
    peer_qemu_version: str = ""
    memory_bytes: int = 0
    bytes_transferred: int = 0
    passes: tuple[PassReport, ...] = ()
    phases: tuple[PhaseReport, ...] = ()
    blackout: BlackoutReport = BlackoutReport()
    clock_skew_ms: float | None = None
    """How far the destination's clock is ahead."""
    options: dict[str, object] = {}
    """As asked for; what is null was left open."""
    plan: dict[str, object] = {}
    """The numbers in force. Source only."""
    rules: tuple[str, ...] = ()
    """What the rules of pre-copy did, in their words."""
    checksum: ChecksumReport | None = None
    timeline: tuple[Moment, ...] = ()
    """Empty without perf_tracing_enabled."""
    warnings: tuple[str, ...] = ()


def phases_of(entries: Iterable[Entry]) -> tuple[PhaseReport, ...]:
    """The phases of a notification record, each with its duration."""
    told = [entry for entry in entries if entry.progress is None]
    following: list[Entry | None] = [*told[1:], None]
    return tuple(
        PhaseReport(
            phase=entry.told.phase.name,
            state=entry.told.state.name,
            at_us=entry.updated_at_us,
            lasted_ms=None if after is None else (after.updated_at_us - entry.updated_at_us) / 1000,
        )
        for entry, after in zip(told, following, strict=False)
    )


def passes_of(entries: Iterable[Entry]) -> tuple[PassReport, ...]:
    """The passes of a notification record: what is left of them where nobody kept the numbers themselves."""
    return tuple(
        PassReport(
            number=numbers.pass_number,
            at_ms=(entry.updated_at_us - entry.started_at_us) / 1000 if entry.started_at_us else 0.0,
            bytes_transferred=numbers.bytes_transferred,
            bytes_remaining=numbers.bytes_remaining,
            dirty_bytes_per_s=numbers.dirty_bytes_per_s,
            bytes_per_s=numbers.bytes_per_s,
            throttle_percent=numbers.guest_throttle_percent,
        )
        for entry in entries
        if (numbers := entry.progress)
    )


def blackout_of(whole: Blackout | None, pieces: Split) -> BlackoutReport:
    """The blackout as this side knows it."""
    return BlackoutReport(
        duration_ms=None if whole is None else whole.duration_us / 1000,
        error_ms=None if whole is None or whole.error_us is None else whole.error_us / 1000,
        method=None if whole is None else whole.method.value,
        stop_ms=pieces.stop_ms,
        last_pass_ms=pieces.last_pass_ms,
        device_state_ms=pieces.device_state_ms,
        handover_ms=pieces.handover_ms,
        resume_ms=pieces.resume_ms,
        stopped_at_us=pieces.stopped_at_us,
        resumed_at_us=pieces.resumed_at_us,
    )


def options_of(options: Options) -> dict[str, object]:
    return {name: getattr(options, name) for name in Options.__dataclass_fields__}


def plan_of(plan: Plan) -> dict[str, object]:
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


def encode(report: Report) -> bytes:
    """The report as JSON, two spaces deep; long lists are cut to their newest, and a warning says so."""
    return msgspec.json.format(msgspec.json.encode(_bounded(report)), indent=2)


def decode(data: bytes) -> Report:
    """What `encode` wrote; fields of later versions are passed over.

    Raises:
        Damaged: it is no report.
    """
    try:
        return msgspec.json.decode(data, type=Report)
    except msgspec.MsgspecError as error:
        raise Damaged(f"this is no report of a session: {error}") from error


def render(report: Report) -> str:
    """The report for a person."""
    return "\n".join(_lines(report)) + "\n"


def _bounded(report: Report) -> Report:
    cut: dict[str, tuple[object, ...]] = {}
    notes = []
    for name, most in (("passes", PASSES_MAX), ("timeline", TIMELINE_MAX), ("warnings", WARNINGS_MAX - 3)):
        values = getattr(report, name)
        if len(values) > most:
            cut[name] = values[-most:]
            notes.append(f"{name}: the newest {most} of {len(values)} are here")
    cut["warnings"] = (*cut.get("warnings", report.warnings), *notes)
    return msgspec.structs.replace(report, **cut) if notes else report


def _lines(report: Report) -> Iterator[str]:
    yield f"session      {report.session_id}"
    yield f"sandbox      {report.sandbox_id}, {report.side}, host {report.host}"
    yield f"outcome      {report.outcome}, finalized with {report.action}{', BY FORCE' if report.forced else ''}"
    if report.failure:
        yield f"failure      {report.failure} (code {report.code})"
    if report.transfer_ms is not None:
        yield f"transfer     {report.transfer_ms:.0f} ms, {_size(report.bytes_transferred)}, {_encryption(report)}"
    yield f"machine      {_size(report.memory_bytes)}, {report.accelerator or '?'}, QEMU {_versions(report)}"
    yield from _blackout_lines(report)
    if report.checksum is not None:
        yield f"checksum     {_matched(report.checksum)}, {report.checksum.took_ms:.1f} ms to hash"
    yield from _table("phases", [_phase_line(phase) for phase in report.phases])
    yield from _table("passes", [_pass_line(one) for one in report.passes])
    yield from _table(
        "options", [f"{name} = {value}" for name, value in report.options.items() if value is not None]
    )
    yield from _table("in force", [f"{name} = {value}" for name, value in report.plan.items()])
    yield from _table("rules", list(report.rules))
    yield from _table("timeline", [f"{moment.at_ms:10.1f} ms  {moment.what}" for moment in report.timeline])
    yield from _table("warnings", list(report.warnings))


def _blackout_lines(report: Report) -> Iterator[str]:
    blackout = report.blackout
    if blackout.duration_ms is not None:
        error = "" if blackout.error_ms is None else f" +- {blackout.error_ms:.1f}"
        yield f"blackout     {blackout.duration_ms:.1f}{error} ms, by {blackout.method}"
    pieces = ("stop", "last_pass", "device_state", "handover", "resume")
    known = [(name, value) for name in pieces if (value := getattr(blackout, f"{name}_ms")) is not None]
    if known:
        yield (
            "   of which  "
            + ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in known)
            + " ms"
        )


def _table(heading: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield heading
        yield from (f"  {line}" for line in lines)


def _phase_line(phase: PhaseReport) -> str:
    lasted = "" if phase.lasted_ms is None else f"{phase.lasted_ms:10.1f} ms"
    return f"{phase.phase:20} {phase.state:28} {lasted}".rstrip()


def _pass_line(one: PassReport) -> str:
    return (
        f"{one.number:4} at {one.at_ms:9.1f} ms  sent {_size(one.bytes_transferred):>12}  left "
        f"{_size(one.bytes_remaining):>12}  dirtied {_size(one.dirty_bytes_per_s):>12}/s  throttle {one.throttle_percent} %"
    )


def _size(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:.1f} MiB"


def _encryption(report: Report) -> str:
    if report.encrypted is None:
        return "encryption not known"
    return "encrypted" if report.encrypted else "NOT ENCRYPTED"


def _versions(report: Report) -> str:
    own, peer = report.qemu_version or "?", report.peer_qemu_version
    return f"{own} (peer {peer})" if peer and peer != own else own


def _matched(checksum: ChecksumReport) -> str:
    return {None: "not compared here", True: "the same on both sides", False: "DIFFERENT"}[checksum.matched]
