"""What to do about a transfer under way: decides from numbers, never waits, never reads a clock.

The shell asks QEMU for its numbers, calls `on_stats`, does what the `Decision` names and calls again after
`next_check_s`. A guest that never converges is brought over or given up, within limits:

1. from `throttling_from_pass` on its CPUs are throttled, more with each pass, up to a peak at `target_passes`;
2. from `target_passes` on a longer blackout is accepted, twice as long with each pass;
3. at `maximum_passes` the switchover is forced;
4. no byte for `stall_s`, or `deadline_s` in all: it is cancelled;
5. a blackout that would be (before it begins for good) or has become longer than the caller allows: it is cancelled.

All five are counted in QEMU's passes (dirty-sync-count), as the contract counts them. Each decision names its rule.
docs/reference/options.md has the mapping from InitializeOptions.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from sandshift.session.options import DOWNTIME_LIMIT_MS_MAX, THROTTLE_PERCENT_MAX, Bounds, Options
from sandshift.session.phases import Outcome
from sandshift.session.record import Progress

THROTTLING_FROM_PASS_DEFAULT: Final = 5
"""A guest that converges is over by then: 3 passes idle, 4 to 5 at 200 MiB/s (measured)."""
MINIMUM_THROTTLE_PERCENT_DEFAULT: Final = 20
"""QEMU's own first step. Source: qapi/migration.json, cpu-throttle-initial."""
TARGET_PASSES_DEFAULT: Final = 12
MAXIMUM_PASSES_DEFAULT: Final = 30
CONVERGING_SHARE: Final = 0.75
"""A pass that begins with at most this share of what its predecessor began with is getting there."""
RELAXED_BLACKOUT_MS_MAX: Final = 1_000
"""How long a blackout may become by rule 2, unless the caller's own target is longer."""
FORCED_BLACKOUT_MS_DEFAULT: Final = 10_000
"""How long a blackout rule 3 accepts where the caller did not ask for it by a maximum of passes."""
DOUBLINGS_MAX: Final = 21
"""More than lead from 1 ms to QEMU's largest limit."""
RATE_WINDOW_S: Final = 1.0
"""Over how long the rate is measured."""
POLL_S: Final = 0.25
XBZRLE_CACHE_BYTES_MIN: Final = 1 << 20
XBZRLE_CACHE_BYTES_MAX: Final = 512 << 20


class Rule(enum.Enum):
    """What acted. The value is what notifications and reports call it."""

    NONE = ""
    THROTTLING = "throttling"
    TARGET_PASSES = "target_passes"
    MAXIMUM_PASSES = "maximum_passes"
    STALL = "stall"
    DEADLINE = "deadline"
    BLACKOUT_THRESHOLD = "blackout_threshold"


@dataclass(frozen=True, slots=True)
class TransferStats:
    """QEMU's numbers about a transfer, at one moment."""

    pass_number: int
    """dirty-sync-count."""
    bytes_total: int
    bytes_transferred: int
    bytes_remaining: int
    dirty_bytes_per_s: int = 0
    bytes_per_s: int = 0
    throttle_percent: int = 0
    expected_blackout_ms: int = 0


@dataclass(frozen=True, slots=True)
class Tuning:
    """What QEMU is told to go by."""

    downtime_limit_ms: int
    throttle_percent: int = 0


@dataclass(frozen=True, slots=True)
class End:
    """Give the transfer up: cancel it, and tell why."""

    outcome: Outcome
    message: str


@dataclass(frozen=True, slots=True)
class Decision:
    progress: Progress
    """To be told; the record thins it."""
    rule: Rule = Rule.NONE
    """What acted just now."""
    said: str = ""
    """What it did, for log and report."""
    tune: Tuning | None = None
    """What to tell QEMU, if it is not what it was told before."""
    end: End | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers that the rules go by: the options, and defaults where they say nothing."""

    downtime_limit_ms: int
    throttling: bool
    throttling_from_pass: int
    throttling_asked_for: bool
    """The caller named the pass: throttle from there on in any case. Else only a guest that does not converge."""
    minimum_throttle_percent: int
    peak_throttle_percent: int
    target_passes: int
    maximum_passes: int
    relaxed_blackout_ms: int
    forced_blackout_ms: int
    threshold_ms: int | None
    stall_s: float
    deadline_s: float


def plan(options: Options, bounds: Bounds, *, downtime_limit_ms: int) -> Plan:
    """Fill in what the options leave open.

    Args:
        options: as parsed; checked already.
        bounds: in force, with the request's own deadline put in.
        downtime_limit_ms: the host's configuration.
    """
    threshold_ms = options.blackout_threshold_ms
    base_ms = options.target_blackout_ms or downtime_limit_ms
    if threshold_ms is not None:
        base_ms = min(base_ms, threshold_ms)
    minimum = options.minimum_throttle_percent or MINIMUM_THROTTLE_PERCENT_DEFAULT
    scale = 100.0 if options.throttling_scale_percent is None else options.throttling_scale_percent
    maximum = options.maximum_passes or max(MAXIMUM_PASSES_DEFAULT, options.target_passes or 0)
    relaxed_ms = max(base_ms, RELAXED_BLACKOUT_MS_MAX)
    asked = options.maximum_passes is not None
    return Plan(
        downtime_limit_ms=base_ms,
        throttling=not options.skip_throttling,
        throttling_from_pass=options.throttling_from_pass or THROTTLING_FROM_PASS_DEFAULT,
        throttling_asked_for=options.throttling_from_pass is not None,
        minimum_throttle_percent=minimum,
        peak_throttle_percent=minimum + math.floor((THROTTLE_PERCENT_MAX - minimum) * scale / 100),
        target_passes=min(options.target_passes or TARGET_PASSES_DEFAULT, maximum),
        maximum_passes=maximum,
        relaxed_blackout_ms=relaxed_ms if threshold_ms is None else min(relaxed_ms, threshold_ms),
        forced_blackout_ms=DOWNTIME_LIMIT_MS_MAX if asked else max(relaxed_ms, FORCED_BLACKOUT_MS_DEFAULT),
        threshold_ms=threshold_ms,
        stall_s=bounds.stall_s,
        deadline_s=bounds.transfer_deadline_s,
    )


def xbzrle_cache_bytes(options: Options, memory_bytes: int) -> int:
    """Cache for delta compression: the largest power of two up to half the memory and 512 MiB; 0 without compression.

    The working set has to fit (128 MiB brought over a guest at 200 MiB/s that nothing else did, measured); the cache
    is the source's memory while the transfer lasts.
    """
    if not options.compression:
        return 0
    wanted = min(max(memory_bytes // 2, XBZRLE_CACHE_BYTES_MIN), XBZRLE_CACHE_BYTES_MAX)
    return 1 << (wanted.bit_length() - 1)


class Precopy:
    """One transfer. Times are seconds of a monotonic clock."""

    def __init__(self, plan: Plan, *, started_s: float) -> None:
        self.plan = plan
        self.tuning = Tuning(plan.downtime_limit_ms)
        """In force: give it to QEMU before the transfer begins."""
        self._started_s = started_s
        self._moved_at_s = started_s
        self._bytes = 0
        self._rule = Rule.NONE
        self._pass = 0
        self._pass_began_with: int | None = None
        self._throttled_from: int | None = None
        self._seen: deque[tuple[float, int]] = deque([(started_s, 0)])
        self._blackout_since_s: float | None = None

    def on_stats(self, stats: TransferStats, *, now_s: float) -> Decision:
        """What to do now that QEMU says this. Calling twice with the same is no harm."""
        self._measure(stats, now_s)
        if end := self._end(now_s):
            rule, why = end
            self._rule = rule
            return Decision(self._progress(stats), rule, why.message, end=why)
        if self._blackout_since_s is not None:
            return Decision(self._progress(stats))
        rule, said, tuning = self._tuned(stats)
        if tuning == self.tuning:
            return Decision(self._progress(stats))
        self.tuning, self._rule = tuning, rule
        return Decision(self._progress(stats), rule, said, tune=tuning)

    def over(self, now_s: float) -> End | None:
        """Which limit has passed, before QEMU has anything to say."""
        end = self._end(now_s)
        return end[1] if end else None

    def on_blackout(self, now_s: float) -> None:
        """The guest has stopped. From now on the transfer is not tuned, and a threshold counts what has passed."""
        self._blackout_since_s = now_s

    def at_switchover(self, stats: TransferStats, *, now_s: float) -> Decision:
        """The guest is stopped and what is left waits to be sent: send it, or cancel while the source can still go on."""
        self._measure(stats, now_s)
        estimate_ms = self._blackout_ms(stats, now_s)
        allowed_ms = self.plan.threshold_ms
        if allowed_ms is None or estimate_ms <= allowed_ms:
            return Decision(self._progress(stats))
        self._rule = Rule.BLACKOUT_THRESHOLD
        rate = self.rate_bytes_per_s(stats)
        message = (
            f"the blackout would take {_shown_ms(estimate_ms)} ({stats.bytes_remaining} bytes left at {rate} bytes/s), "
            f"more than the {allowed_ms} ms of blackout_time_threshold_for_cancelling_migration: the guest goes on "
            "here; raise the threshold, or move it when it writes less"
        )
        end = End(Outcome.BLACKOUT_THRESHOLD, message)
        return Decision(self._progress(stats), self._rule, message, end=end)

    def next_check_s(self, now_s: float) -> float:
        """How long the shell may wait before it asks QEMU again, if nothing happens before."""
        due = [self._moved_at_s + self.plan.stall_s, self._started_s + self.plan.deadline_s]
        if self._blackout_since_s is not None and self.plan.threshold_ms is not None:
            due.append(self._blackout_since_s + self.plan.threshold_ms / 1000)
        return max(0.0, min(POLL_S, *(at_s - now_s for at_s in due)))

    def rate_bytes_per_s(self, stats: TransferStats) -> int:
        """How fast memory flows: the better of what QEMU says and what was measured here over the last second.

        Both can be low by accident, QEMU's in its first period and ours after a poll that came late; none is high.
        """
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        measured = int((last - first) / (last_s - first_s)) if last_s > first_s else 0
        return max(stats.bytes_per_s, measured)

    def _measure(self, stats: TransferStats, now_s: float) -> None:
        if stats.bytes_transferred != self._bytes:
            self._bytes, self._moved_at_s = stats.bytes_transferred, now_s
        self._seen.append((now_s, stats.bytes_transferred))
        while len(self._seen) > 2 and now_s - self._seen[1][0] >= RATE_WINDOW_S:
            self._seen.popleft()

    def _end(self, now_s: float) -> tuple[Rule, End] | None:
        plan, moved_s, running_s = self.plan, now_s - self._moved_at_s, now_s - self._started_s
        if moved_s >= plan.stall_s:
            return Rule.STALL, End(
                Outcome.STALL,
                f"no byte has moved for {moved_s:.1f} s, limits.stall_s is {plan.stall_s:g}: look at the network and at "
                "the destination, then migrate again",
            )
        if running_s >= plan.deadline_s:
            return Rule.DEADLINE, End(
                Outcome.DEADLINE,
                f"the transfer took {running_s:.1f} s and its deadline is {plan.deadline_s:g} s: give it a longer "
                "deadline, more bandwidth, or a maximum number of passes",
            )
        if self._blackout_since_s is None or plan.threshold_ms is None:
            return None
        if (dark_ms := (now_s - self._blackout_since_s) * 1000) <= plan.threshold_ms:
            return None
        return Rule.BLACKOUT_THRESHOLD, End(
            Outcome.BLACKOUT_THRESHOLD,
            f"the blackout has lasted {dark_ms:.0f} ms, more than the {plan.threshold_ms} ms of "
            "blackout_time_threshold_for_cancelling_migration: the guest goes on here",
        )

    def _tuned(self, stats: TransferStats) -> tuple[Rule, str, Tuning]:
        """What QEMU should go by in this pass, and the rule that made it so."""
        plan, number, rule, acts = self.plan, stats.pass_number, Rule.NONE, []
        throttle = self._throttle(stats)
        if throttle != self.tuning.throttle_percent:
            rule = Rule.THROTTLING
            acts.append(f"guest CPUs throttled by {throttle} %")
        limit_ms = max(self._limit_ms(number), self.tuning.downtime_limit_ms)
        if limit_ms != self.tuning.downtime_limit_ms and number >= plan.maximum_passes:
            rule = Rule.MAXIMUM_PASSES
            acts.append(
                f"at most {plan.maximum_passes} passes: switchover forced, blackout up to {limit_ms} ms"
            )
        elif limit_ms != self.tuning.downtime_limit_ms:
            rule = Rule.TARGET_PASSES
            acts.append(f"{plan.target_passes} passes were aimed at: blackout up to {limit_ms} ms accepted")
        return rule, f"pass {number}: " + "; ".join(acts), Tuning(limit_ms, throttle)

    def _limit_ms(self, number: int) -> int:
        """How long a blackout is accepted in pass `number`."""
        plan = self.plan
        if number >= plan.maximum_passes:
            return plan.forced_blackout_ms
        doublings = min(max(number - plan.target_passes + 1, 0), DOUBLINGS_MAX)
        return max(plan.downtime_limit_ms, min(plan.downtime_limit_ms << doublings, plan.relaxed_blackout_ms))

    def _throttle(self, stats: TransferStats) -> int:
        """Percent: the minimum at the first throttled pass, rising in a straight line to the peak at the target."""
        plan, number = self.plan, stats.pass_number
        self._watch_passes(stats)
        if self._throttled_from is None:
            return 0
        ramp = plan.target_passes - self._throttled_from
        share = 1.0 if ramp <= 0 else min(1.0, (number - self._throttled_from) / ramp)
        span = plan.peak_throttle_percent - plan.minimum_throttle_percent
        return max(plan.minimum_throttle_percent + int(span * share), self.tuning.throttle_percent)

    def _watch_passes(self, stats: TransferStats) -> None:
        """Notice a new pass, and whether throttling begins with it."""
        if stats.pass_number == self._pass:
            return
        before, self._pass = self._pass_began_with, stats.pass_number
        self._pass_began_with = stats.bytes_remaining
        if self._throttled_from is not None or not self.plan.throttling:
            return
        if stats.pass_number < self.plan.throttling_from_pass:
            return
        converging = before is not None and stats.bytes_remaining <= before * CONVERGING_SHARE
        if self.plan.throttling_asked_for or not converging:
            self._throttled_from = stats.pass_number

    def _blackout_ms(self, stats: TransferStats, now_s: float) -> float:
        """From the guest's stop to the last byte: what has passed, and what is left at the measured rate."""
        since_s = now_s if self._blackout_since_s is None else self._blackout_since_s
        return (now_s - since_s) * 1000 + _sending_ms(stats.bytes_remaining, self.rate_bytes_per_s(stats))

    def _progress(self, stats: TransferStats) -> Progress:
        sending_ms = _sending_ms(stats.bytes_remaining, self.rate_bytes_per_s(stats))
        return Progress(
            pass_number=stats.pass_number,
            bytes_total=stats.bytes_total,
            bytes_transferred=stats.bytes_transferred,
            bytes_remaining=stats.bytes_remaining,
            dirty_bytes_per_s=stats.dirty_bytes_per_s,
            bytes_per_s=self.rate_bytes_per_s(stats),
            guest_throttle_percent=stats.throttle_percent,
            expected_blackout_ms=stats.expected_blackout_ms
            if math.isinf(sending_ms)
            else math.ceil(sending_ms),
            rule=self._rule.value,
        )


def _sending_ms(remaining_bytes: int, bytes_per_s: int) -> float:
    """How long `remaining_bytes` take; without end if nothing moves."""
    if remaining_bytes == 0:
        return 0.0
    return remaining_bytes * 1000 / bytes_per_s if bytes_per_s > 0 else math.inf


def _shown_ms(value_ms: float) -> str:
    return "for ever" if math.isinf(value_ms) else f"{value_ms:.0f} ms"
