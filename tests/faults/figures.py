"""What a run comes to, in numbers that a machine can read."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.faults.cases import Promise
from tests.faults.control import Control
from tests.faults.play import Played


@dataclass(slots=True)
class Figures:
    played: list[Played] = field(default_factory=list)
    control: Control | None = None
    took_s: float = 0.0
    interrupted: bool = False

    @property
    def good(self) -> bool:
        return all(each.good for each in self.played) and (self.control is None or self.control.found)

    def document(self) -> dict[str, object]:
        """Counts are of cases, save `stale_pages` and `leftovers`, which count pages and things."""
        times = [each.recovery_ms for each in self.played if each.recovery_ms is not None]
        return {
            "cases": len(self.played),
            "two_runners": _count(bool(each.clashes) for each in self.played),
            "lost_guests": _count(each.lost for each in self.played),
            "stale_pages": sum(each.bad_pages for each in self.played),
            "leftovers": sum(len(each.leftovers) for each in self.played),
            "recovered": _count(each.came is Promise.RUNS and each.good for each in self.played),
            "operator_needed": _count(each.came is Promise.OPERATOR for each in self.played),
            "lost_with_its_qemu": _count(each.came is Promise.LOST and not each.lost for each in self.played),
            "moved_again": _count(each.moved_again for each in self.played),
            "recovery_ms": {
                "median": round(statistics.median(times), 1) if times else None,
                "max": round(max(times), 1) if times else None,
            },
            "failed": [each.case.name for each in self.played if not each.good],
            "control_two_runners_seen": self.control.found if self.control else None,
            "seconds": round(self.took_s, 1),
        }

    def text(self) -> str:
        document = self.document()
        return "\n".join(f"{name}: {value}" for name, value in document.items())


def line(played: Played) -> str:
    """One case in one line, for a person who watches."""
    verdict = "ok" if played.good else "FAILED"
    seconds = f", recovered in {played.recovery_ms / 1e3:.1f} s" if played.recovery_ms is not None else ""
    told = [
        *played.problems,
        *(f"two runners: {clash}" for clash in played.clashes[:3]),
        *(f"left over: {name}" for name in played.leftovers[:10]),
        *([f"{played.bad_pages} stale pages"] if played.bad_pages else []),
        *(["the guest is lost"] if played.lost else []),
    ]
    came = played.came.value if played.came else "no end"
    text = (
        f"{verdict} {played.case.name}: {came} ({played.ended or '-'}){seconds}; {played.took_s:.1f} s in all"
    )
    return "\n    ".join((text, *told))


def _count(which: Iterable[bool]) -> int:
    return sum(1 for each in which if each)
