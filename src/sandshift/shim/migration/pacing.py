"""The rules of pre-copy (`session/precopy.py`) for one sending VM: its numbers in, its settings out, a log for the report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sandshift.session.precopy import End, Precopy, TransferStats, Tuning, plan, xbzrle_cache_bytes
from sandshift.session.report import PassReport
from sandshift.vmm.machine import MigrationInfo, TransferSettings

if TYPE_CHECKING:
    from sandshift.config import Config
    from sandshift.session.options import Bounds, Options
    from sandshift.session.record import Progress

MIB = 1 << 20


class StopSending(Exception):
    """A rule gives the transfer up."""

    def __init__(self, end: End) -> None:
        self.outcome = end.outcome
        self.message = end.message
        super().__init__(end.message)


class Pacer:
    """See the module."""

    def __init__(
        self, config: Config, options: Options, bounds: Bounds, *, memory_bytes: int, now_s: float
    ) -> None:
        pace = plan(options, bounds, downtime_limit_ms=config.migration.downtime_limit_ms)
        self.plan = pace
        self.bytes_transferred = 0
        self._precopy = Precopy(pace, started_s=now_s)
        self._started_s = now_s
        self.settings = TransferSettings(
            bandwidth_bytes_per_s=config.migration.bandwidth_mib_per_s * MIB,
            downtime_limit_ms=self._precopy.tuning.downtime_limit_ms,
            xbzrle_cache_bytes=xbzrle_cache_bytes(options, memory_bytes),
            throttling=pace.throttling,
        )
        self.wants_estimate = pace.threshold_ms is not None
        self.passes: dict[int, PassReport] = {}
        self.said: list[str] = []
        """What the rules did, in their words."""

    def on_info(self, info: MigrationInfo, *, now_s: float) -> tuple[Progress, TransferSettings | None]:
        """The progress to tell, and new settings if a rule acted. Raises StopSending if one gives up."""
        stats = _stats(info)
        self._note(stats, now_s)
        decision = self._precopy.on_stats(stats, now_s=now_s)
        if decision.said:
            self.said.append(decision.said)
        if decision.end is not None:
            raise StopSending(decision.end)
        return decision.progress, self._tuned(decision.tune)

    def in_setup(self, now_s: float) -> None:
        """The two VMs have not agreed yet: only the limits count. Raises StopSending if one has passed."""
        if (end := self._precopy.over(now_s)) is not None:
            self.said.append(end.message)
            raise StopSending(end)

    def _note(self, stats: TransferStats, now_s: float) -> None:
        self.bytes_transferred = stats.bytes_transferred
        self.passes[stats.pass_number] = PassReport(
            number=stats.pass_number,
            at_ms=(now_s - self._started_s) * 1000,
            bytes_transferred=stats.bytes_transferred,
            bytes_remaining=stats.bytes_remaining,
            dirty_bytes_per_s=stats.dirty_bytes_per_s,
            bytes_per_s=stats.bytes_per_s,
            throttle_percent=stats.throttle_percent,
        )

    def pass_reports(self) -> tuple[PassReport, ...]:
        """What QEMU said at the last look in each pass, in order."""
        return tuple(self.passes[number] for number in sorted(self.passes))

    def ended(self, info: MigrationInfo, *, now_s: float) -> None:
        """QEMU's last word on the transfer."""
        self._note(_stats(info), now_s)

    def _tuned(self, tuning: Tuning | None) -> TransferSettings | None:
        if tuning is None:
            return None
        self.settings = replace(
            self.settings,
            downtime_limit_ms=tuning.downtime_limit_ms,
            throttle_percent=tuning.throttle_percent,
        )
        return self.settings

    def guest_stopped(self, now_s: float) -> None:
        self._precopy.on_blackout(now_s)

    def before_switchover(self, info: MigrationInfo, *, now_s: float) -> None:
        """Raises StopSending if the blackout would be longer than the caller allows."""
        decision = self._precopy.at_switchover(_stats(info), now_s=now_s)
        if decision.end is not None:
            self.said.append(decision.said)
            raise StopSending(decision.end)

    def next_look_s(self, now_s: float) -> float:
        return self._precopy.next_check_s(now_s)


def _stats(info: MigrationInfo) -> TransferStats:
    return TransferStats(
        pass_number=info.passes,
        bytes_total=info.ram_total_bytes,
        bytes_transferred=info.ram_transferred_bytes,
        bytes_remaining=info.ram_remaining_bytes,
        dirty_bytes_per_s=info.dirty_bytes_per_s,
        bytes_per_s=info.bytes_per_s,
        throttle_percent=info.throttle_percent,
        expected_blackout_ms=info.expected_downtime_ms,
    )
