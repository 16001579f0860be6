"""The migration benchmark's arithmetic."""

from __future__ import annotations

from bench._migration_figures import Pair, Run, call_medians, load_figures, spread, table


def pair(ours: tuple[float, float, float], bare: tuple[float, float, float]) -> Pair:
    return Pair(Run(*ours, calls_ms={"Cancel": ours[0]}), Run(*bare))


PAIRS = [
    pair((300, 15, 60), (200, 9, 50)),
    pair((280, 14, 70), (210, 8, 55)),
    pair((900, 13, 80), (190, 7, 60)),
]


def test_medians_stand_beside_each_other():
    figures = load_figures(PAIRS)
    assert figures["total_ms"] == {"ours": 300, "bare": 200}
    assert figures["blackout_ms"] == {"ours": 14, "bare": 8}
    assert figures["client_gap_ms"] == 70
    assert figures["client_gap_bare_ms"] == 55
    assert len(figures["runs"]) == 3


def test_goals_are_the_issues():
    goals = load_figures(PAIRS)["goals"]
    assert goals["total_ms"] == {"value": 300, "at_most": 280.0, "met": False}
    assert goals["blackout_ms"] == {"value": 14, "at_most": 16.0, "met": True}
    assert goals["client_gap_ms"] == {"value": 70, "at_most": 74.0, "met": True}


def test_spread_is_least_quartiles_and_most():
    assert spread([1, 2, 3, 4, 5]) == {"min": 1, "p25": 2, "p75": 4, "max": 5}
    assert spread([7]) == {"min": 7, "p25": 7, "p75": 7, "max": 7}


def test_calls_are_told_by_their_medians():
    assert call_medians([each.ours for each in PAIRS]) == {"Cancel": 300}


def test_the_table_names_what_was_missed():
    text = table({"idle": load_figures(PAIRS)})
    assert "goal total_ms" in text
    assert "MISSED" in text
    row = next(line for line in text.splitlines() if line.startswith("  total_ms"))
    assert row.split() == [
        "total_ms",
        "300",
        "200",
        "1.50",
        "280",
        "290",
        "600",
        "900",
        "|",
        "190",
        "195",
        "205",
        "210",
    ]
