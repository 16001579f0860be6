"""What a run is worth: the figures, the exit, the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import results
from tests.faults.cases import CASES, Promise, Victim
from tests.faults.control import Control
from tests.faults.figures import Figures, line
from tests.faults.play import Played
from tests.faults.table import BEGIN, with_matrix

CASE = next(case for case in CASES if case.step.name == "setup" and case.victim is Victim.CUT)


def well() -> Played:
    return Played(CASE, came=Promise.RUNS, ended="undone", recovery_ms=1234.0, moved_again=True)


def test_a_good_run_counts_and_passes() -> None:
    document = Figures([well()], Control(True, "seen")).document()
    assert document["cases"] == document["recovered"] == document["moved_again"] == 1
    assert document["recovery_ms"] == {"median": 1234.0, "max": 1234.0}
    assert document["failed"] == []
    assert document["control_two_runners_seen"] is True
    assert Figures([well()], Control(True, "seen")).good


@pytest.mark.parametrize(
    ("harm", "figure", "count"),
    [
        ({"clashes": ["b said 7 after a had said 8"]}, "two_runners", 1),
        ({"bad_pages": 3}, "stale_pages", 3),
        ({"leftovers": ["tap ss0", "process 7 (qemu)"]}, "leftovers", 2),
        ({"lost": True}, "lost_guests", 1),
    ],
)
def test_each_harm_is_counted_and_fails_the_run(harm: dict[str, object], figure: str, count: int) -> None:
    played = well()
    for name, value in harm.items():
        setattr(played, name, value)
    figures = Figures([well(), played])
    assert figures.document()[figure] == count
    assert figures.document()["failed"] == [CASE.name]
    assert figures.document()["recovered"] == 1
    assert not figures.good
    assert line(played).startswith(f"FAILED {CASE.name}")


def test_a_control_that_was_not_seen_fails_the_run() -> None:
    assert not Figures([well()], Control(False, "NOT seen")).good


def test_a_guest_that_went_with_its_qemu_is_no_lost_guest() -> None:
    document = Figures([Played(CASE, came=Promise.LOST, ended="crashed")]).document()
    assert (document["lost_guests"], document["lost_with_its_qemu"]) == (0, 1)


def test_the_page_keeps_its_words_and_gets_the_new_matrix() -> None:
    page = with_matrix(f"# Words\n\n{BEGIN}\n\nan old matrix\n", Figures([well()]))
    assert page.startswith(f"# Words\n\n{BEGIN}\n\n| figure | |\n")
    assert "an old matrix" not in page
    assert "| setup (S) |  |  |  |  |  |  |  | S 1.2 |  |" in page
    with pytest.raises(ValueError, match="the page has no line"):
        with_matrix("# Words\n", Figures([well()]))


def test_results_come_back_from_their_file_and_only_what_failed_or_is_missing_is_played(
    tmp_path: Path,
) -> None:
    failed = Played(CASES[0], problems=["no end"])
    results.write(tmp_path / "results.json", [failed, well()])
    earlier = results.read(tmp_path / "results.json")
    assert earlier == [failed, well()]
    assert results.still_to_play((CASES[0], CASES[1], CASE), earlier) == (CASES[0], CASES[1])
    again = Played(CASES[0], came=Promise.RUNS)
    assert results.merged(earlier, [again]) == [again, well()]
    assert results.read(tmp_path / "none.json") == []
