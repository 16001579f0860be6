"""`sandshift conformance` on two shims with fake VMs."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from sandshift.conformance.side import Side
from tests.conformance.fakes import House


async def conformance(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sandshift", "conformance", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_it_tells_a_line_a_case_and_then_the_figures(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        sockets = (
            "--source",
            house.addresses[Side.SOURCE],
            "--destination",
            house.addresses[Side.DESTINATION],
        )
        status, out, err = await conformance(*sockets, "--only", "cell SourceExported x C*")
        assert (status, err) == (0, "")
        assert out.splitlines() == [
            "passed  cell SourceExported x CreateDuplicateSocket (SRC) [3]",
            "passed  cell SourceExported x Cancel (SRC) [3]",
            "passed  cell SourceExported x Cleanup (SRC) [3]",
            "3 passed, 0 failed, 0 skipped",
        ]


async def test_without_a_reset_what_follows_a_move_is_skipped(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        sockets = (
            "--source",
            house.addresses[Side.SOURCE],
            "--destination",
            house.addresses[Side.DESTINATION],
        )
        status, out, _err = await conformance(*sockets, "--only", "2691 a whole move*", "--json")
        document = json.loads(out)
        assert status == 0
        assert (document["passed"], document["failed"], document["skipped"]) == (1, 0, 1)
        assert "--reset" in document["cases"][1]["reason"]


async def test_a_shim_that_is_not_there_fails_the_case() -> None:
    status, out, _err = await conformance(
        "--source", "/nowhere/a", "--destination", "/nowhere/b", "--only", "cell Idle x Cancel (SRC)"
    )
    assert status == 1
    assert "the shims cannot be reached" in out


async def test_a_pattern_that_matches_nothing_is_a_usage_error() -> None:
    status, _out, err = await conformance("--source", "a", "--destination", "b", "--only", "no such case")
    assert status == 2
    assert "no case matches 'no such case'" in err
