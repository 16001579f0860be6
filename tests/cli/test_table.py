"""Tables."""

from __future__ import annotations

from sandshift.cli.table import table


def test_columns_are_aligned_and_empty_cells_are_dashes() -> None:
    assert table(["ID", "STATE"], [["s-1", "running"], ["sandbox-2", ""]]) == (
        "ID          STATE\ns-1         running\nsandbox-2   -"
    )


def test_a_table_without_rows_is_its_header() -> None:
    assert table(["ID", "STATE"], []) == "ID   STATE"
