"""docs/reference/demo.md tells every figure."""

from __future__ import annotations

from pathlib import Path

from sandshift.cli.demo.command import failed_figures
from sandshift.cli.demo.proof import figures
from sandshift.errors import Rejected
from tests.demo.test_proof import good

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/demo.md").read_text()


def test_every_key_of_the_json_is_on_the_page():
    keys = {*figures(good()), *failed_figures(Rejected("no"))}
    assert [key for key in sorted(keys) if f"`{key}`" not in PAGE] == []
