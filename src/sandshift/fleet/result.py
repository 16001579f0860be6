"""What a migration came to, in numbers: for the person who asked for it, the demo and the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sandshift.errors import SandshiftError
from sandshift.fleet.saga import Outcome
from sandshift.session.states import Side
from sandshift.wire.migration import messages_pb2, options_pb2

BLACKOUT_PARTS: Final = frozenset({"stop", "last_pass", "device_state", "handover", "resume"})


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is, as the source says. Bytes, bytes per second, milliseconds."""

    pass_number: int
    bytes_total: int
    bytes_transferred: int
    bytes_remaining: int
    dirty_bytes_per_s: int
    bytes_per_s: int
    throttle_percent: int
    expected_blackout_ms: int


@dataclass(frozen=True, slots=True)
class Update:
    """One notification of one side, or (phase "call") one call that was answered."""

    side: Side
    phase: str
    """As in the contract, without PHASE_: "TRANSFER_IN_PROGRESS"."""
    state: str
    """As in the contract, without PHASE_STATE_: "SUCCESS"."""
    at_ms: float
    """When the coordinator learned it, milliseconds since the first TransferSandbox; before that negative."""
    unix_us: int
    """When the side says that it happened, by its own clock: microseconds since the epoch."""
    message: str = ""
    progress: Progress | None = None
    blackout_ms: int | None = None
    """With BLACKOUT_EXITED: from the guest's stop on the source to its start on the destination."""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call of the coordinator. Milliseconds, `began_ms` relative to the first TransferSandbox."""

    side: Side
    call: str
    began_ms: float
    took_ms: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """How a migration ended, and what it took."""

    sandbox_id: str
    session_id: str
    source: str
    destination: str
    outcome: Outcome
    total_ms: float | None = None
    """From the first TransferSandbox to the answer of RESUME on the destination: the guest runs there by then."""
    blackout_ms: float | None = None
    """How long the guest ran nowhere, as both QEMUs' event stamps say. Whole milliseconds where there is no report."""
    blackout_parts_ms: Mapping[str, float] = field(default_factory=dict)
    """What it went to, as both sides reported: "stop", "last_pass", "handover", "resume"."""
    stopped_at_us: int | None = None
    """QEMU's STOP on the source: that host's clock, microseconds since the epoch."""
    resumed_at_us: int | None = None
    """QEMU's RESUME on the destination, by that host's clock."""
    passes: int = 0
    bytes_transferred: int = 0
    phases: tuple[Update, ...] = ()
    """Every phase of both sides in the order in which the coordinator learned of them; progress left out."""
    calls: tuple[CallRecord, ...] = ()
    failed_call: str = ""
    reason: SandshiftError | None = None
    warnings: tuple[str, ...] = ()

    @property
    def moved(self) -> bool:
        return self.outcome is Outcome.MOVED

    def document(self) -> dict[str, object]:
        """This result as JSON shows it: docs/reference/cli.md, "sandshift migrate"."""
        return {
            "sandbox": self.sandbox_id,
            "session": self.session_id,
            "source": self.source,
            "destination": self.destination,
            "outcome": self.outcome.value,
            "total_ms": self.total_ms,
            "blackout_ms": self.blackout_ms,
            "blackout_parts_ms": dict(self.blackout_parts_ms),
            "passes": self.passes,
            "bytes_transferred": self.bytes_transferred,
            "failed_call": self.failed_call,
            "error": self.reason.message if self.reason else "",
            "warnings": list(self.warnings),
            "phases": [
                {
                    "side": update.side.word,
                    "phase": update.phase,
                    "state": update.state,
                    "at_ms": round(update.at_ms, 3),
                    "message": update.message,
                }
                for update in self.phases
            ],
            "calls": [
                {
                    "side": call.side.word,
                    "call": call.call,
                    "began_ms": round(call.began_ms, 3),
                    "took_ms": round(call.took_ms, 3),
                    "error": call.error,
                }
                for call in self.calls
            ],
        }


def blackout_parts(reports: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The parts of the blackout that the sides reported, each by the side that can measure it. Milliseconds."""
    found: dict[str, float] = {}
    for report in reports:
        for name, value in (report.get("blackout") or {}).items():
            part = name.removesuffix("_ms")
            if part in BLACKOUT_PARTS and isinstance(value, int | float):
                found[part] = float(value)
    return found


@dataclass(slots=True)
class Story:
    """What is learned while a migration runs, until it becomes a result."""

    phases: list[Update] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    passes: int = 0
    bytes_transferred: int = 0
    blackout_ms: float | None = None
    stopped_at_us: int | None = None
    resumed_at_us: int | None = None

    def note(self, update: Update) -> None:
        """Take in one notification."""
        if update.progress is None:
            self.phases.append(update)
        else:
            self.passes = max(self.passes, update.progress.pass_number)
            self.bytes_transferred = max(self.bytes_transferred, update.progress.bytes_transferred)
        if update.blackout_ms is not None:
            self.blackout_ms = update.blackout_ms

    def read(self, report: Mapping[str, Any]) -> None:
        """Take in a side's report: it counts to the end, where live progress stops before the last pass."""
        passes, sent_bytes = report.get("passes"), report.get("bytes_transferred")
        blackout = report.get("blackout") or {}
        blackout_ms = blackout.get("duration_ms")
        self.stopped_at_us = blackout.get("stopped_at_us") or self.stopped_at_us
        self.resumed_at_us = blackout.get("resumed_at_us") or self.resumed_at_us
        if isinstance(blackout_ms, int | float) and self.blackout_ms is not None:
            self.blackout_ms = float(blackout_ms)
        if isinstance(passes, list) and passes:
            self.passes = max(self.passes, len(passes))
        if isinstance(sent_bytes, int):
            self.bytes_transferred = max(self.bytes_transferred, sent_bytes)


def update_of(response: messages_pb2.NotificationsResponse, side: Side, *, at_ms: float) -> Update:
    """A notification off the wire. Names that this program does not know become their numbers."""
    notification = response.notification
    has_progress = notification.HasField("progress")
    is_exit = notification.HasField("blackout_exited")
    return Update(
        side=side,
        phase=_name(options_pb2.Phase, notification.phase, "PHASE_"),
        state=_name(options_pb2.PhaseState, notification.state, "PHASE_STATE_"),
        at_ms=at_ms,
        unix_us=response.update_time.ToMicroseconds(),
        message=notification.failure.message,
        progress=_progress(notification.progress) if has_progress else None,
        blackout_ms=notification.blackout_exited.blackout_duration_milliseconds if is_exit else None,
    )


def _progress(message: options_pb2.TransferProgress) -> Progress:
    return Progress(
        pass_number=getattr(message, "pass"),
        bytes_total=message.bytes_total,
        bytes_transferred=message.bytes_transferred,
        bytes_remaining=message.bytes_remaining,
        dirty_bytes_per_s=message.dirty_bytes_per_second,
        bytes_per_s=message.bytes_per_second,
        throttle_percent=message.guest_throttle_percent,
        expected_blackout_ms=message.expected_blackout_milliseconds,
    )


def _name(enum: object, number: int, prefix: str) -> str:
    try:
        name: str = enum.Name(number)  # type: ignore[attr-defined]
    except ValueError:
        return str(number)
    return name.removeprefix(prefix)
