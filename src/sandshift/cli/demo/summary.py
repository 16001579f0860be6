"""The demo's last word to a person, made from its figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sandshift.cli.demo.workload import MIB

_LABEL_WIDTH: Final = 12
_BOOT_ID_CHARS: Final = 8


def summary(figures: Mapping[str, Any]) -> str:
    """Several lines: what happened, what each check found, and whether the move is proven."""
    lines = [_headline(figures), ""]
    lines += [f"  {label:<{_LABEL_WIDTH}}{text}" for label, text in _rows(figures)]
    if figures["ok"]:
        lines += ["", "Proven: nothing was lost."]
    else:
        lines += ["", "NOT proven:", *(f"  - {reason}" for reason in figures["reasons"])]
        if figures["failure"]:
            lines.append(f"  what failed: {figures['failure']}")
    return "\n".join(lines)


def _headline(figures: Mapping[str, Any]) -> str:
    if not figures["total_ms"]:
        return "The sandbox did not move."
    return "A running virtual machine moved from host A to host B, with its memory, its processes and its connections."


def _rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    moved = f"{_mib(figures['bytes_transferred'])} in {figures['passes']} passes, {_ms(figures['total_ms'])} in all"
    vm = f"QEMU {figures['qemu_version'] or '?'}, {figures['accelerator'] or '?'}, {_mib(figures['memory_bytes'])}"
    rows = [("moved", moved), ("stood still", _stillness(figures))] if figures["total_ms"] else []
    return [
        *rows,
        ("connection", _connection(figures)),
        ("memory", _memory(figures)),
        ("same guest", _guest(figures)),
        ("encrypted", _encrypted(figures)),
        ("machine", vm),
    ]


def _stillness(figures: Mapping[str, Any]) -> str:
    return (
        f"{_ms(figures['blackout_ms'])} by both QEMUs' own stamps; the client's longest wait between two answers was"
        f" {_ms(figures['client_gap_ms'])} ({_ms(figures['client_gap_before_ms'])} before the move)"
    )


def _connection(figures: Mapping[str, Any]) -> str:
    kept = (
        "one TCP connection throughout" if figures["tcp_connection_survived"] else "the TCP connection BROKE"
    )
    return (
        f"{kept}: {figures['counter_answers']:,} numbers came, {figures['counter_answers_after']:,} of them after the"
        f" move, {figures['counter_lost']:,} lost, {figures['counter_repeated']:,} repeated"
    )


def _memory(figures: Mapping[str, Any]) -> str:
    rate = figures["dirty_bytes_per_s"] / MIB
    checked = f"{figures['pages_checked']:,} page checks while and after it was rewritten at {rate:.0f} MiB/s"
    if figures["memory_verified"]:
        return f"{checked}: all right"
    return f"{checked}: {figures['pages_stale']:,} pages WRONG"


def _guest(figures: Mapping[str, Any]) -> str:
    before, after = figures["boot_id_before"], figures["boot_id_after"]
    if before and before == after:
        return (
            f"boot {before[:_BOOT_ID_CHARS]} before and after; up {figures['uptime_before_s']:.1f} s, then"
            f" {figures['uptime_after_s']:.1f} s"
        )
    return f"boot {before[:_BOOT_ID_CHARS] or '?'} before, {after[:_BOOT_ID_CHARS] or '?'} after"


def _encrypted(figures: Mapping[str, Any]) -> str:
    seen, control = figures["capture"], figures["control_capture"]
    text = f"{_mib(seen['bytes'])} captured between the hosts hold {_count(seen['pattern_blocks'])} of the memory"
    if seen["drops"]:
        text += f" ({seen['drops']:,} packets missed)"
    if control:
        text += f"; with encryption off the same capture found {_count(control['pattern_blocks'])}"
    return text


def _count(blocks: int) -> str:
    return f"{blocks:,} page{'' if blocks == 1 else 's'}" if blocks else "no page"


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"


def _ms(value: float) -> str:
    return f"{value / 1000:.1f} s" if value >= 1000 else f"{value:.0f} ms"
