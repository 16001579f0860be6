"""What the migration benchmark's runs come to: medians, spread, and how they stand against the goals. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

TOTAL_RATIO_MAX: Final = 1.15
TOTAL_MARGIN_MS: Final = 50.0
BLACKOUT_MARGIN_MS: Final = 8.0
GAP_MARGIN_MS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """One move. Milliseconds."""

    total_ms: float
    """From the start of the transfer to the guest running."""
    blackout_ms: float
    """Destination's RESUME minus source's STOP, QEMU's event stamps."""
    client_gap_ms: float
    """The client's longest silence around the move."""
    passes: int = 0
    bytes_transferred: int = 0
    calls_ms: Mapping[str, float] = field(default_factory=dict)
    """Ours only: how long each call took, by its name."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One move of each kind, one after the other."""

    ours: Run
    bare: Run


def load_figures(pairs: Sequence[Pair]) -> dict[str, object]:
    """One load's part of the JSON: medians, spread, goals, every run."""
    total, blackout = (_both(pairs, name) for name in ("total_ms", "blackout_ms"))
    gap = _both(pairs, "client_gap_ms")
    goals = {
        "total_ms": bound(total["ours"], total["bare"] * TOTAL_RATIO_MAX + TOTAL_MARGIN_MS),
        "blackout_ms": bound(blackout["ours"], blackout["bare"] + BLACKOUT_MARGIN_MS),
        "client_gap_ms": bound(gap["ours"], blackout["ours"] + GAP_MARGIN_MS),
    }
    return {
        "total_ms": total,
        "blackout_ms": blackout,
        "client_gap_ms": gap["ours"],
        "client_gap_bare_ms": gap["bare"],
        "spread_ms": {
            name: {
                kind: spread([getattr(getattr(pair, kind), name) for pair in pairs])
                for kind in ("ours", "bare")
            }
            for name in ("total_ms", "blackout_ms", "client_gap_ms")
        },
        "goals": goals,
        "calls_ms": call_medians([pair.ours for pair in pairs]),
        "runs": [asdict(pair) for pair in pairs],
    }


def _both(pairs: Sequence[Pair], name: str) -> dict[str, float]:
    return {
        kind: round(statistics.median(getattr(getattr(pair, kind), name) for pair in pairs), 1)
        for kind in ("ours", "bare")
    }


def bound(value: float, limit: float) -> dict[str, object]:
    """A figure, what it may be at most, and whether it is."""
    return {"value": round(value, 1), "at_most": round(limit, 1), "met": value <= limit}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, quartiles and most."""
    if len(values) < 2:
        return {"min": values[0], "p25": values[0], "p75": values[0], "max": values[0]}
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "min": round(min(values), 1),
        "p25": round(low, 1),
        "p75": round(high, 1),
        "max": round(max(values), 1),
    }


def call_medians(runs: Sequence[Run]) -> dict[str, float]:
    """Per call, the median of how long it took, in the order of the first run."""
    names = list(runs[0].calls_ms) if runs else []
    return {
        name: round(statistics.median(run.calls_ms[name] for run in runs if name in run.calls_ms), 1)
        for name in names
    }


def table(loads: Mapping[str, Mapping[str, object]]) -> str:
    """The figures for a person. `loads`: load's name -> `load_figures`."""
    lines = [f"{'':24}{'ours':>10}{'bare':>10}{'ratio':>8}   spread (min p25 p75 max), ours | bare"]
    for load, figures in loads.items():
        lines.append(load)
        lines.extend(_row(name, figures) for name in ("total_ms", "blackout_ms", "client_gap_ms"))
        for name, goal in _mapping(figures["goals"]).items():
            held = _mapping(goal)
            verdict = "met" if held["met"] else "MISSED"
            lines.append(
                f"    goal {name:<15} {held['value']:>8} ms, at most {held['at_most']} ms: {verdict}"
            )
        calls = ", ".join(f"{name} {took_ms} ms" for name, took_ms in _mapping(figures["calls_ms"]).items())
        lines.append(f"    ours, call by call (medians): {calls}")
    return "\n".join(lines)


def _row(name: str, figures: Mapping[str, object]) -> str:
    value = figures[name]
    if isinstance(value, Mapping):
        ours, bare = value["ours"], value["bare"]
    else:
        ours, bare = value, figures["client_gap_bare_ms"]
    spreads = _mapping(_mapping(figures["spread_ms"])[name])
    both = " | ".join(
        " ".join(f"{part:g}" for part in _mapping(spreads[kind]).values()) for kind in ("ours", "bare")
    )
    ratio = float(ours) / float(bare) if bare else float("nan")
    return f"  {name:<22}{ours:>10}{bare:>10}{ratio:>8.2f}   {both}"


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping)
    return value
