"""How long the guest ran nowhere: as a duration, right also when the two hosts' clocks differ.

The guest stops by the source's clock and runs again by the destination's. Subtracting one stamp from the other gives
the blackout plus the difference of the clocks, which may be seconds. So the blackout is added up of pieces that each
host measured by itself:

    source:      stop ....................... completed     (`stopped_for_us`, in the handover record)
    destination:                     loaded ............................ runs again

The two pieces meet at one moment: with return-path on, the source's VM process completes when the destination's has
said that everything is loaded, half a round trip later, and so much is counted twice and taken off again. The error is
at most that half and what is said beside it. When and how the handover record itself came over does not count: before
it is sent it is written to the source's disk, and a destination that hashes its memory reads it only afterwards.
Without one of the pieces (a shim that was not there when its VM process completed) the stamps of both clocks are all
there is, the result says so, and its error is not known.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

SCHEDULING_US: Final = 2_000
"""How late a busy source may see that the destination has loaded everything; part of the error, not of the estimate."""
WAY_US_MAX: Final = 5_000_000
"""No way is longer than this: a round trip that says so was measured on a connection that stood still."""


class Method(enum.Enum):
    PIECES = "pieces"
    """Added up of what each host measured: free of the difference of their clocks."""
    CLOCKS = "clocks"
    """The difference of two hosts' stamps: as good as their clocks agree."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Blackout:
    duration_us: int
    error_us: int | None
    """The true duration is at most this much off; None: not known."""
    method: Method

    @property
    def duration_ms(self) -> int:
        return round(self.duration_us / 1000)


@dataclass(frozen=True, slots=True)
class SourceSays:
    """From the handover record. Microseconds; 0: not said."""

    stopped_at_us: int
    """QEMU's STOP, by the source's clock since the epoch."""
    stopped_for_us: int
    """How long ago that was when the source's VM process had completed."""


@dataclass(frozen=True, slots=True)
class DestinationSaw:
    """By the destination's clock since the epoch, microseconds; 0: not seen."""

    loaded_at_us: int
    """QEMU's MIGRATION completed."""
    resumed_at_us: int
    """QEMU's RESUME."""
    round_trip_us: int = 0
    """Of a small message on the quiet channel (TCP_INFO's min_rtt); 0: not measured."""


def measure(source: SourceSays, destination: DestinationSaw) -> Blackout:
    """The blackout, as well as it can be known."""
    if not destination.resumed_at_us:
        return Blackout(0, None, Method.UNKNOWN)
    here_us = destination.resumed_at_us - destination.loaded_at_us
    if destination.loaded_at_us and source.stopped_for_us and here_us >= 0:
        way_us = min(destination.round_trip_us // 2, WAY_US_MAX)
        lasted_us = max(0, source.stopped_for_us - way_us) + here_us
        return Blackout(lasted_us, way_us + SCHEDULING_US, Method.PIECES)
    if source.stopped_at_us:
        return Blackout(max(0, destination.resumed_at_us - source.stopped_at_us), None, Method.CLOCKS)
    return Blackout(max(0, here_us) if destination.loaded_at_us else 0, None, Method.UNKNOWN)


def clock_skew_us(source: SourceSays, destination: DestinationSaw) -> int | None:
    """How far the destination's clock is ahead of the source's, microseconds; None if one of them did not see its VM complete.

    The record carries the source's time of that (stop plus duration); the destination's was half a round trip earlier.
    """
    if not (destination.loaded_at_us and source.stopped_at_us and source.stopped_for_us):
        return None
    completed_at_us = source.stopped_at_us + source.stopped_for_us
    return destination.loaded_at_us + destination.round_trip_us // 2 - completed_at_us


def skew_warning(skew_us: int | None, *, most_us: int = 1_000_000) -> str:
    """A sentence for the report if the clocks differ by more than `most_us`; else nothing."""
    if skew_us is None or abs(skew_us) <= most_us:
        return ""
    where = "ahead of" if skew_us > 0 else "behind"
    return f"the destination's clock is {abs(skew_us) / 1e6:.1f} s {where} the source's: set both by NTP"


@dataclass(frozen=True, slots=True)
class SourceStamps:
    """Moments on the source during the blackout: its clock, microseconds since the epoch; 0: did not happen."""

    stopped_us: int = 0
    """QEMU's STOP."""
    continued_us: int = 0
    """Streams, disks and memory digest are settled; QEMU was told to send the rest."""
    memory_sent_us: int = 0
    """The last pass is out, what follows is device state. QEMU has no event for it: 0 unless it was estimated."""
    completed_us: int = 0
    """QEMU's MIGRATION completed."""


@dataclass(frozen=True, slots=True)
class DestinationStamps:
    """Moments on the destination: its clock, microseconds since the epoch; 0: did not happen."""

    completed_us: int = 0
    """QEMU's MIGRATION completed: everything is loaded."""
    starting_us: int = 0
    """The right has passed and STARTING is written: the virtual CPUs may start."""
    resumed_us: int = 0
    """QEMU's RESUME."""


@dataclass(frozen=True, slots=True)
class Split:
    """Where the blackout went, milliseconds; None: this side did not see it.

    No piece crosses the two clocks, so the pieces of both sides may be added up.
    """

    stop_ms: float | None = None
    """From the guest's stop until QEMU was told to send the rest: streams, digest, estimate."""
    last_pass_ms: float | None = None
    """The memory that was left. Where QEMU's memory and device state cannot be told apart: both."""
    device_state_ms: float | None = None
    handover_ms: float | None = None
    """From everything loaded until the right was here and written, the caller's RESUME included."""
    resume_ms: float | None = None
    """From the decision to start until the virtual CPUs run."""
    stopped_at_us: int | None = None
    """The whole's two ends, each by the clock of its side."""
    resumed_at_us: int | None = None


def split(source: SourceStamps | None = None, destination: DestinationStamps | None = None) -> Split:
    """The pieces that the given stamps tell of."""
    there, here = source or SourceStamps(), destination or DestinationStamps()
    sent_us = there.memory_sent_us or there.completed_us
    return Split(
        stop_ms=_between_ms(there.stopped_us, there.continued_us),
        last_pass_ms=_between_ms(there.continued_us, sent_us),
        device_state_ms=_between_ms(there.memory_sent_us, there.completed_us),
        handover_ms=_between_ms(here.completed_us, here.starting_us),
        resume_ms=_between_ms(here.starting_us, here.resumed_us),
        stopped_at_us=there.stopped_us or None,
        resumed_at_us=here.resumed_us or None,
    )


def _between_ms(begin_us: int, end_us: int) -> float | None:
    return (end_us - begin_us) / 1000 if 0 < begin_us <= end_us else None
