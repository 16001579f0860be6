"""The matrix as a page of the documents: one row a step, one column a victim, in each field what came and how long it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from sandshift.session.states import Side
from tests.faults.cases import Promise, Victim
from tests.faults.figures import Figures
from tests.faults.play import Played
from tests.faults.steps import CHAPTERS, Plan, Step

BEGIN: Final = "<!-- The rest of this page is written by `./run faults --markdown`. -->"
COLUMNS: Final = {
    Victim.SOURCE_SHIM: "S shim",
    Victim.DESTINATION_SHIM: "D shim",
    Victim.SOURCE_QEMU: "S QEMU",
    Victim.DESTINATION_QEMU: "D QEMU",
    Victim.SOURCE_BOTH: "S both",
    Victim.DESTINATION_BOTH: "D both",
    Victim.COORDINATOR: "coord.",
    Victim.CUT: "cut",
    Victim.SILENCE: "silent",
}
OF_THE_RUN: Final = frozenset({"seconds"})
"""Figures that say nothing of the matrix."""
WORDS: Final = {"moved": "D", "undone": "S", "refused": "S"}


def with_matrix(page: str, figures: Figures) -> str:
    """`page` with everything after BEGIN replaced by this run's matrix.

    Raises:
        ValueError: the page has no such line.
    """
    above, found, _below = page.partition(BEGIN)
    if not found:
        raise ValueError(f"the page has no line {BEGIN}")
    return above + BEGIN + "\n\n" + matrix(figures)


def matrix(figures: Figures) -> str:
    """The run's figures and its tables."""
    by_place = {(each.case.step, each.case.victim): each for each in figures.played}
    chapters = (
        f"### {title}\n\n{_chapter(steps, by_place)}"
        for title, steps in CHAPTERS.items()
        if any(step == played_step for step in steps for played_step, _victim in by_place)
    )
    return "\n".join((_figures(figures), *chapters))


def _figures(figures: Figures) -> str:
    rows = (
        f"| `{name}` | {_shown(value)} |"
        for name, value in figures.document().items()
        if name not in OF_THE_RUN
    )
    return "\n".join(("| figure | |", "|---|---|", *rows, ""))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(str(each) for each in value) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _chapter(steps: Iterable[Step], by_place: Mapping[tuple[Step, Victim], Played]) -> str:
    rows = []
    for step in steps:
        fields = [_field(by_place.get((step, victim))) for victim in COLUMNS]
        if any(fields):
            rows.append(f"| {_named(step)} | {' | '.join(fields)} |")
    header = f"| step | {' | '.join(COLUMNS.values())} |"
    return "\n".join((header, "|---" * (len(COLUMNS) + 1) + "|", *rows, ""))


def _named(step: Step) -> str:
    side = "S" if step.side is Side.SOURCE else "D"
    return f"{step.name} ({side})" if step.plan is Plan.MOVE else f"{step.name} ({side}, {step.plan.value})"


def _field(played: Played | None) -> str:
    if played is None:
        return ""
    if not played.good:
        return "**failed**"
    match played.came:
        case Promise.LOST:
            return "lost with it"
        case Promise.OPERATOR:
            return "operator"
        case _:
            seconds = (played.recovery_ms or 0.0) / 1e3
            return f"{WORDS.get(played.ended, played.ended)} {seconds:.1f}"
