"""What a transfer asks of QEMU, and what QEMU says about it: pure translations, both ways.

Why each setting is as it is: the source must hear of a failed destination (return-path), must be able to settle things
while the guest is stopped (pause-before-switchover), and must never send one guest into another's VM (validate-uuid).
The throttle is ours: QEMU's own ladder (auto-converge) is held at one rung, `initial` = `max`, and moved by `tune`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from sandshift.errors import PeerProtocolError, Rejected
from sandshift.vmm.machine import MigrationInfo, MigrationStatus, TransferSettings

UNLIMITED_BYTES_PER_S: Final = 1 << 40
THROTTLE_FLOOR_PERCENT: Final = 1
"""The least that QEMU's throttle can be set to."""
THROTTLE_MAX_PERCENT: Final = 99
THROTTLE_STEP_PERCENT: Final = 99
"""From any rung to the one asked for in a single step."""
THROTTLE_TRIGGER_PERCENT: Final = 1
"""QEMU moves the throttle only in periods whose dirty bytes exceed this share of what was sent."""
DOWNTIME_LIMIT_MAX_MS: Final = 2_000_000
"""QEMU's own bound. Source: qapi/migration.json."""

Json = dict[str, object]

_ENDED: Final = frozenset({MigrationStatus.COMPLETED, MigrationStatus.FAILED, MigrationStatus.CANCELLED})
_UNDER_WAY: Final = frozenset(
    {
        MigrationStatus.SETUP,
        MigrationStatus.ACTIVE,
        MigrationStatus.PRE_SWITCHOVER,
        MigrationStatus.DEVICE,
        MigrationStatus.CANCELLING,
    }
)

_STATUS_ALIASES: Final[Mapping[str, MigrationStatus]] = {
    "wait-unplug": MigrationStatus.SETUP,
}
"""States that pre-copy without failover passes through at most for a moment."""


def has_ended(status: MigrationStatus) -> bool:
    return status in _ENDED


def is_under_way(status: MigrationStatus) -> bool:
    return status in _UNDER_WAY


def capabilities_out(settings: TransferSettings) -> list[Json]:
    """Set before the source starts; QEMU lets none of them change while it sends."""
    return _capabilities(
        {
            "events": True,
            "return-path": True,
            "pause-before-switchover": True,
            "validate-uuid": True,
            "auto-converge": settings.throttling,
            "xbzrle": settings.xbzrle_cache_bytes > 0,
        }
    )


def capabilities_in() -> list[Json]:
    return _capabilities({"events": True, "return-path": True, "validate-uuid": True})


def capabilities_file() -> list[Json]:
    """For a template: a file answers nothing, and a clone has a uuid of its own."""
    return _capabilities(
        {"events": True, "return-path": False, "pause-before-switchover": False, "validate-uuid": False}
    )


def parameters(settings: TransferSettings) -> Json:
    """migrate-set-parameters for these settings; also while a transfer runs.

    Raises:
        Rejected: a value is outside what QEMU can do; names it.
    """
    if not 1 <= settings.downtime_limit_ms <= DOWNTIME_LIMIT_MAX_MS:
        raise Rejected(
            f"downtime limit of {settings.downtime_limit_ms} ms: it must be 1 to {DOWNTIME_LIMIT_MAX_MS}"
        )
    if not 0 <= settings.throttle_percent <= THROTTLE_MAX_PERCENT:
        raise Rejected(
            f"throttle of {settings.throttle_percent} percent: it must be 0 to {THROTTLE_MAX_PERCENT}"
        )
    if settings.throttle_percent and not settings.throttling:
        raise Rejected(f"throttle of {settings.throttle_percent} percent in a transfer that may not throttle")
    if settings.bandwidth_bytes_per_s < 0:
        raise Rejected(f"bandwidth of {settings.bandwidth_bytes_per_s} bytes per second")
    rung = max(THROTTLE_FLOOR_PERCENT, settings.throttle_percent)
    values: Json = {
        "max-bandwidth": settings.bandwidth_bytes_per_s or UNLIMITED_BYTES_PER_S,
        "downtime-limit": settings.downtime_limit_ms,
    }
    if settings.throttling:
        values |= {
            "cpu-throttle-initial": rung,
            "max-cpu-throttle": rung,
            "cpu-throttle-increment": THROTTLE_STEP_PERCENT,
            "throttle-trigger-threshold": THROTTLE_TRIGGER_PERCENT,
        }
    if settings.xbzrle_cache_bytes:
        values["xbzrle-cache-size"] = settings.xbzrle_cache_bytes
    return values


def migration_status(text: str) -> MigrationStatus:
    """QEMU's word for it.

    Raises:
        PeerProtocolError: a state that pre-copy does not know.
    """
    if text in _STATUS_ALIASES:
        return _STATUS_ALIASES[text]
    try:
        return MigrationStatus(text)
    except ValueError:
        raise PeerProtocolError(
            f"QEMU reports migration status {text!r}, which a pre-copy never has"
        ) from None


def migration_info(answer: object) -> MigrationInfo:
    """query-migrate's answer. Fields that QEMU does not give in a state are 0.

    Source: qapi/migration.json, MigrationInfo and MigrationRAMInfo. `mbps` is megabits of 10^6.
    """
    info = _mapping(answer)
    ram = _mapping(info.get("ram"))
    page_bytes = _number(ram, "page-size") or 4096
    return MigrationInfo(
        status=migration_status(str(info.get("status", "none"))),
        error=str(info.get("error-desc", "")),
        total_ms=_number(info, "total-time"),
        downtime_ms=_number(info, "downtime"),
        setup_ms=_number(info, "setup-time"),
        expected_downtime_ms=_number(info, "expected-downtime"),
        ram_total_bytes=_number(ram, "total"),
        ram_transferred_bytes=_number(ram, "transferred"),
        ram_remaining_bytes=_number(ram, "remaining"),
        dirty_bytes_per_s=_number(ram, "dirty-pages-rate") * page_bytes,
        bytes_per_s=int(_float(ram, "mbps") * 1e6 / 8),
        passes=_number(ram, "dirty-sync-count"),
        throttle_percent=_number(info, "cpu-throttle-percentage"),
    )


def with_error(info: MigrationInfo, words: str) -> MigrationInfo:
    """The same with what the VM process said about it, if it said anything."""
    return replace(info, error=f"{info.error}: {words}" if info.error and words else info.error or words)


def _capabilities(wanted: Mapping[str, bool]) -> list[Json]:
    return [{"capability": name, "state": state} for name, state in wanted.items()]


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _number(values: Mapping[str, object], key: str) -> int:
    value = values.get(key, 0)
    return int(value) if isinstance(value, (int, float)) else 0


def _float(values: Mapping[str, object], key: str) -> float:
    value = values.get(key, 0.0)
    return float(value) if isinstance(value, (int, float)) else 0.0
