"""What the demo's evidence proves. Pure: evidence in, figures and reasons out; the exit status follows from them.

`ok` is computed from the figures alone (`reasons_against`), so that anybody who has the printed JSON can compute it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Final

from sandshift.cli.demo.capture import Seen
from sandshift.cli.demo.client import Answer

NS_PER_MS: Final = 1_000_000
PASSES_MIN: Final = 2
"""Fewer, and memory was not copied while it was written to."""
DIRTY_SHARE_MIN: Final = 0.5
"""A writer that reached less of the rate it was asked for did not put the load on that the demo is about."""

Figures = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the client's record says about the connection."""

    answers: int
    lost: int
    """Numbers that were given out to this client and never arrived."""
    repeated: int
    """Numbers that came twice, or out of order."""
    mismatched: int
    """Answers that were for another request."""
    unanswered: int
    answers_after: int
    """Answers to requests that were sent after the move."""
    failure: str

    @property
    def survived(self) -> bool:
        return not self.failure and not self.unanswered and self.answers_after > 0


def conversation(answers: Sequence[Answer], *, moved_ns: int, unanswered: int, failure: str) -> Conversation:
    """Count what is wrong in a client's record. The client is the only one that asks, so its numbers are consecutive."""
    repeated = lost = 0
    expected = 1
    for answer in answers:
        if answer.number < expected:
            repeated += 1
        else:
            lost += answer.number - expected
            expected = answer.number + 1
    return Conversation(
        answers=len(answers),
        lost=lost,
        repeated=repeated,
        mismatched=sum(not answer.nonce_matched for answer in answers),
        unanswered=unanswered,
        answers_after=sum(answer.asked_ns > moved_ns for answer in answers),
        failure=failure,
    )


def longest_silence_ms(answers: Sequence[Answer], *, from_ns: int, to_ns: int) -> float:
    """The longest time between two answers, of the silences that touch the time from `from_ns` to `to_ns`."""
    times = sorted(answer.answered_ns for answer in answers)
    if not times or times[0] > from_ns:
        times.insert(0, from_ns)
    if times[-1] < to_ns:
        times.append(to_ns)
    touching = [after - before for before, after in pairwise(times) if after > from_ns and before < to_ns]
    longest_ns = max(touching, default=0)
    return longest_ns / NS_PER_MS


@dataclass(frozen=True, slots=True)
class MemoryCheck:
    """The writer's own last report, after a check of every page."""

    pages: int = 0
    pages_checked: int = 0
    pages_stale: int = 0
    generation: int = 0
    bytes_per_s: int = 0
    """Rate reached at the last progress report."""
    examples: tuple[Mapping[str, object], ...] = ()


@dataclass(frozen=True, slots=True)
class Guest:
    """Which boot of which kernel answers, and how long it has been up."""

    boot_id: str = ""
    uptime_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Move:
    """What QEMU and the shims say about the move."""

    accelerator: str
    qemu_version: str
    memory_bytes: int
    total_ms: float
    """From the first TransferSandbox to the guest running on the destination."""
    blackout_ms: float
    """Destination's RESUME minus source's STOP, by QEMU's event stamps."""
    bytes_transferred: int
    passes: int
    encryption: str
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Control:
    """The second, short move with encryption off: does the capture find the pattern when it is there?"""

    seen: Seen
    bytes_transferred: int
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the demo has collected."""

    move: Move
    conversation: Conversation
    client_gap_ms: float
    quiet_gap_ms: float
    """The client's longest silence before the move: what this machine does to it anyway."""
    memory: MemoryCheck
    dirty_bytes_per_s_wanted: int
    before: Guest
    after: Guest
    seen: Seen
    control: Control | None
    """None: it was not asked for."""


def figures(evidence: Evidence) -> dict[str, object]:
    """The evidence as one flat JSON object; `ok` and `reasons` are computed from the rest."""
    move, talk, memory = evidence.move, evidence.conversation, evidence.memory
    made: dict[str, object] = {
        "accelerator": move.accelerator,
        "qemu_version": move.qemu_version,
        "memory_bytes": move.memory_bytes,
        "total_ms": round(move.total_ms, 1),
        "blackout_ms": round(move.blackout_ms, 1),
        "client_gap_ms": round(evidence.client_gap_ms, 1),
        "client_gap_before_ms": round(evidence.quiet_gap_ms, 1),
        "bytes_transferred": move.bytes_transferred,
        "passes": move.passes,
        "tcp_connection_survived": talk.survived,
        "counter_answers": talk.answers,
        "counter_answers_after": talk.answers_after,
        "counter_lost": talk.lost,
        "counter_repeated": talk.repeated + talk.mismatched,
        "working_set_pages": memory.pages,
        "pages_checked": memory.pages_checked,
        "pages_stale": memory.pages_stale,
        "stale_examples": [dict(example) for example in memory.examples],
        "generation": memory.generation,
        "memory_verified": 0 < memory.pages <= memory.pages_checked and memory.pages_stale == 0,
        "dirty_bytes_per_s": memory.bytes_per_s,
        "dirty_bytes_per_s_wanted": evidence.dirty_bytes_per_s_wanted,
        "encryption": move.encryption,
        "capture": asdict(evidence.seen),
        "control_capture": asdict(evidence.control.seen) if evidence.control else None,
        "encrypted": _unreadable(move, evidence.seen),
        "boot_id_before": evidence.before.boot_id,
        "boot_id_after": evidence.after.boot_id,
        "uptime_before_s": round(evidence.before.uptime_s, 3),
        "uptime_after_s": round(evidence.after.uptime_s, 3),
        "failure": move.failure or talk.failure or (evidence.control.failure if evidence.control else ""),
    }
    reasons = reasons_against(made)
    return {"ok": not reasons, **made, "reasons": reasons}


def _unreadable(move: Move, seen: Seen) -> bool:
    """The channel was encrypted, as far as can be seen from outside: all of it was captured and no pattern was in it."""
    whole = seen.drops == 0 and seen.bytes >= move.bytes_transferred > 0
    return move.encryption != "off" and whole and seen.pattern_blocks == 0


def reasons_against(made: Figures) -> list[str]:
    """Why the figures do not prove a whole move; empty: they do. Never looks at "ok" or "reasons"."""
    return [reason for holds, reason in _CLAIMS if not holds(made)]


def _number(made: Figures, key: str) -> float:
    value = made.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def _control_found(made: Figures) -> bool:
    control = made.get("control_capture")
    return control is None or (isinstance(control, Mapping) and control.get("pattern_blocks", 0) > 0)


def _same_boot(made: Figures) -> bool:
    return bool(made.get("boot_id_before")) and made["boot_id_before"] == made.get("boot_id_after")


_CLAIMS: Final[Sequence[tuple[Callable[[Figures], bool], str]]] = (
    (lambda made: not made.get("failure"), "a step failed"),
    (lambda made: _number(made, "total_ms") > 0, "the move did not end"),
    (lambda made: 0 < _number(made, "blackout_ms") <= _number(made, "total_ms"), "the blackout is not known"),
    (lambda made: _number(made, "bytes_transferred") > 0, "no memory was transferred"),
    (lambda made: _number(made, "passes") >= PASSES_MIN, "memory was not copied in at least two passes"),
    (lambda made: made.get("tcp_connection_survived") is True, "the client's TCP connection did not survive"),
    (lambda made: _number(made, "counter_answers_after") > 0, "the counter did not answer after the move"),
    (lambda made: made.get("counter_lost") == 0, "counter values were lost"),
    (lambda made: made.get("counter_repeated") == 0, "counter values were repeated"),
    (lambda made: made.get("memory_verified") is True, "the guest's memory is not verified"),
    (
        lambda made: _number(made, "pages_checked") >= _number(made, "working_set_pages") > 0,
        "not every page was checked",
    ),
    (lambda made: made.get("pages_stale") == 0, "pages of the pattern are wrong"),
    (
        lambda made: (
            _number(made, "dirty_bytes_per_s") >= DIRTY_SHARE_MIN * _number(made, "dirty_bytes_per_s_wanted")
        ),
        "the writer did not reach half of its rate",
    ),
    (lambda made: made.get("encrypted") is True, "the channel is not proven to be encrypted"),
    (_control_found, "the capture did not find the pattern even with encryption off"),
    (_same_boot, "the guest booted again"),
    (
        lambda made: _number(made, "uptime_after_s") > _number(made, "uptime_before_s") > 0,
        "the guest's uptime did not go on",
    ),
)
