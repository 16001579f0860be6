"""docs/start.md, word by word, with real VMs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandshift.cli.demo.leftovers import end_processes
from tests.needs import needs_root

pytestmark = [pytest.mark.vm, needs_root]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "start.md"


@pytest.fixture
def names(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A prefix for the namespaces and a folder in place of the page's; whatever happens, nothing of it stays."""
    prefix = f"doc{os.getpid()}-"
    yield prefix, tmp_path / "two"
    namespaces = [prefix + host for host in "ab"]
    end_processes(namespaces, tmp_path / "two")
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def test_the_steps_of_the_start_page_lead_to_a_sandbox_that_counts_on_elsewhere(
    names: tuple[str, Path],
) -> None:
    prefix, folder = names
    steps = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = "set -eu\n" + "".join(steps).replace("two-", prefix).replace("/tmp/two", str(folder))
    tools = Path(sys.executable).parent
    ran = subprocess.run(
        ["sh", "-c", script],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "sandbox one can move to host b\n" in ran.stdout
    assert "one runs on host b\n" in ran.stdout
    assert re.search(r"^one +running +b ", ran.stdout, re.MULTILINE)
    before, after = (counted(part) for part in ran.stdout.split("one runs on host b\n"))
    assert before == list(range(1, len(before) + 1))
    assert after == list(range(after[0], after[0] + len(after)))
    assert after[0] > before[-1]
    assert not folder.exists()


def counted(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^line (\d+)$", text, re.MULTILINE)]
