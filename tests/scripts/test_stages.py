"""How ./run test adds up its stages, with small commands in the place of the real ones."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def load_stages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sandshift_stages", ROOT / "scripts" / "stages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


stages = load_stages()
GOOD = stages.Stage("good", (sys.executable, "-c", ""))
BAD = stages.Stage("bad", (sys.executable, "-c", "raise SystemExit(3)"))


@pytest.fixture(autouse=True)
def results_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "RESULTS", tmp_path)


def test_the_last_line_adds_up_the_stages(capfd: pytest.CaptureFixture[str]) -> None:
    assert stages.run_all((GOOD, GOOD), keep_going=False) == 0
    assert capfd.readouterr().out == "2 passed, 0 failed\n"


def test_the_first_failing_stage_ends_the_run_and_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert stages.run_all((GOOD, BAD, GOOD), keep_going=False) == 1
    captured = capfd.readouterr()
    assert captured.out == "1 passed, 1 failed\n"
    assert "stage bad failed: the stages after it were not run" in captured.err


def test_check_goes_on_after_a_failing_stage(capfd: pytest.CaptureFixture[str]) -> None:
    assert stages.run_all((BAD, GOOD), keep_going=True) == 1
    assert capfd.readouterr().out == "1 passed, 1 failed\n"


def test_a_stage_past_its_bound_is_ended_and_failed(capfd: pytest.CaptureFixture[str]) -> None:
    endless = stages.Stage("endless", (sys.executable, "-c", "import signal; signal.pause()"), bound_s=0.2)
    assert stages.run(endless) == stages.Counts(failed=1)
    assert "ended after its bound of 0 s" in capfd.readouterr().err


def test_a_stage_that_is_ended_may_clean_up_first(tmp_path: Path) -> None:
    mark = tmp_path / "cleaned"
    script = f"""
import pathlib, signal
try:
    print("ready", flush=True)
    signal.pause()
except KeyboardInterrupt:
    pathlib.Path({str(mark)!r}).write_text("yes")
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, process_group=0)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    stages.end_group(process)
    assert mark.read_text() == "yes"
    process.stdout.close()


def test_a_program_that_is_not_there_fails_its_stage(capfd: pytest.CaptureFixture[str]) -> None:
    assert stages.run(stages.Stage("absent", ("no-such-program-here",))) == stages.Counts(failed=1)
    assert "no-such-program-here is not installed" in capfd.readouterr().err


def test_in_ci_a_skipped_test_has_failed_unless_it_is_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tests = tmp_path / "test_two.py"
    tests.write_text(
        "import pytest\n@pytest.mark.skip(reason='no Go')\ndef test_a(): pass\n"
        "@pytest.mark.skip(reason='optional: needs KVM')\ndef test_b(): pass\n"
        "@pytest.mark.parametrize('seed', [])\ndef test_past_failures(seed): pass\n"
    )
    stage = stages.pytest_stage(
        "two", "--override-ini=addopts=-q", f"--rootdir={tmp_path}", str(tests), bound_s=60
    )
    monkeypatch.setenv("CI", "true")
    assert stages.run(stage) == stages.Counts(failed=1, skipped=2)
    assert "skipped in CI: test_two::test_a: no Go" in capfd.readouterr().err


def in_ci(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> object:
    tests = folder / "test_in_ci.py"
    tests.write_text("import pytest\n" + text)
    monkeypatch.setenv("CI", "true")
    return stages.run(
        stages.pytest_stage(
            "in-ci", "--override-ini=addopts=-q", f"--rootdir={folder}", str(tests), bound_s=60
        )
    )


def test_in_ci_a_file_that_is_skipped_whole_has_failed_unless_it_is_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    skipped = "pytest.skip({!r}, allow_module_level=True)\ndef test_a(): pass\n"
    counts = in_ci(monkeypatch, tmp_path, skipped.format("needs a rocket"))
    assert counts.failed >= 1  # type: ignore[attr-defined]
    assert "skipped in CI: ::test_in_ci: needs a rocket" in capfd.readouterr().err
    optional = skipped.format("optional: needs a rocket") + ""
    counts = in_ci(monkeypatch, tmp_path, optional)
    assert counts.skipped == 1  # type: ignore[attr-defined]
    assert "skipped in CI" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "def test_a(): pytest.skip('not here')\n",
        "@pytest.mark.skipif(True, reason='not here')\ndef test_a(): pass\n",
        "@pytest.fixture\ndef thing(): pytest.skip('not here')\ndef test_a(thing): pass\n",
        "@pytest.mark.xfail(reason='known')\ndef test_a(): assert False\n",
        "def test_a(): pytest.importorskip('no_such_module_here')\n",
        "@pytest.mark.parametrize('n', [pytest.param(1, marks=pytest.mark.skip(reason='later'))])\ndef test_a(n): pass\n",
    ],
    ids=["in the test", "by a mark", "in a fixture", "expected to fail", "a missing module", "one parameter"],
)
def test_in_ci_no_way_of_leaving_a_test_out_goes_unnoticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    passing = "def test_b(): pass\n"
    assert in_ci(monkeypatch, tmp_path, text + passing) == stages.Counts(passed=1, failed=1)
    assert "skipped in CI: test_in_ci::test_a" in capfd.readouterr().err


def test_every_test_is_in_exactly_one_stage_of_what_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "export CI=true" in script
    assert re.findall(r"\./run (test.*)", script) == ["test", "test full"]
    runs = [stage for level in ("default", "full") for stage in flat(stages.LEVELS[level]) if stage.is_pytest]
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    known = [line.partition(":")[0] for line in pyproject["tool"]["pytest"]["ini_options"]["markers"]]
    assert {"vm", "full"} <= set(known)
    for values, is_in_half in itertools.product(
        itertools.product((False, True), repeat=len(known)), (False, True)
    ):
        marks = dict(zip(known, values, strict=True))
        taken = [stage.name for stage in runs if takes(stage, marks, is_in_half=is_in_half)]
        assert len(taken) == 1, (marks, is_in_half, taken)


def flat(parts: tuple[object, ...]) -> list[Any]:
    rows = [row for part in parts for row in (part.rows if isinstance(part, stages.Lanes) else ((part,),))]
    return [stage for row in rows for stage in row]


def takes(stage: Any, marks: dict[str, bool], *, is_in_half: bool) -> bool:
    """Whether a stage runs a test with these marks in, or out of, the folders that have a stage of their own."""
    folders = [part for part in stage.arguments if part.startswith("tests")]
    ignored = [part for part in stage.arguments if part.startswith("--ignore")]
    assert tuple(folders) in {(), stages.HALF}, "a stage of other folders would leave out the rest"
    assert ignored in ([], [f"--ignore={folder}" for folder in stages.HALF])
    assert all((ROOT / folder).is_dir() for folder in folders)
    if (folders and not is_in_half) or (ignored and is_in_half):
        return False
    return bool(eval(stage.arguments[stage.arguments.index("-m", 3) + 1], {}, marks))


def lanes(*rows: tuple[Any, ...]) -> Any:
    return stages.Lanes(rows)


def test_rows_run_side_by_side_and_all_their_stages_count(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each waits for the other's mark: one after the other neither would end."""
    meet = (
        "import pathlib, sys, time\nfolder, mine, other = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]\n"
        "(folder / mine).touch()\nwhile not (folder / other).exists(): time.sleep(0.01)\nprint('met', other)"
    )
    one, other = (
        stages.Stage(name, (sys.executable, "-c", meet, str(tmp_path), *names), bound_s=60)
        for name, names in (("one", ("a", "b")), ("other", ("b", "a")))
    )
    assert stages.run_all((lanes((one, GOOD), (other,)), GOOD), keep_going=False) == 0
    captured = capfd.readouterr()
    assert captured.out == "4 passed, 0 failed\n"
    assert {"met a", "met b"} <= set(captured.err.splitlines())
    assert (tmp_path / "one.log").read_text() == "met b\n"


def test_a_failure_ends_its_row_and_what_comes_after_the_lanes(capfd: pytest.CaptureFixture[str]) -> None:
    assert stages.run_all((lanes((BAD, GOOD), (GOOD, GOOD)), GOOD), keep_going=False) == 1
    captured = capfd.readouterr()
    assert captured.out == "2 passed, 1 failed\n"
    assert "stage bad failed: the stages after it in its row were not run" in captured.err


def test_both_rows_are_ended_when_the_run_is(tmp_path: Path) -> None:
    script = f"""
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("sandshift_stages", {str(ROOT / "scripts" / "stages.py")!r})
stages = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stages)
stages.RESULTS = pathlib.Path({str(tmp_path)!r})
program = (
    "import pathlib, signal, sys\\n"
    "try:\\n    print('ready', flush=True); signal.pause()\\n"
    "except KeyboardInterrupt:\\n    pathlib.Path(sys.argv[1]).write_text('cleaned')"
)
rows = [
    (stages.Stage(name, (sys.executable, "-c", program, str(stages.RESULTS / (name + ".mark")))),)
    for name in ("one", "other")
]
stages.LEVELS["fast"] = (stages.Lanes(tuple(rows)),)
sys.exit(stages.main(["fast"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    logs = [tmp_path / f"{name}.log" for name in ("one", "other")]
    while not all(log.exists() and log.read_text() == "ready\n" for log in logs):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 130
    assert [(tmp_path / f"{name}.mark").read_text() for name in ("one", "other")] == ["cleaned", "cleaned"]


def test_a_pytest_stage_counts_its_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    stage = stages.pytest_stage(
        "three", "--override-ini=addopts=-q", f"--rootdir={tmp_path}", str(tests), bound_s=60
    )
    assert stages.run(stage) == stages.Counts(passed=1, failed=1, skipped=1)


def test_a_pytest_that_finds_no_tests_has_failed(tmp_path: Path) -> None:
    (tmp_path / "test_none.py").write_text("")
    stage = stages.pytest_stage("none", f"--rootdir={tmp_path}", str(tmp_path / "test_none.py"), bound_s=60)
    assert stages.run(stage) == stages.Counts(failed=1)


def test_skipped_tests_are_told_only_when_there_are_some() -> None:
    assert str(stages.Counts(3, 1, 0)) == "3 passed, 1 failed"
    assert str(stages.Counts(3, 1, 2)) == "3 passed, 1 failed, 2 skipped"


def test_generated_files_that_differ_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    for folder, files in {
        "old": {"a.py": "1", "b.py": "1", "c.txt": "1"},
        "new": {"a.py": "1", "b.py": "2", "d.pyi": ""},
    }.items():
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    assert stages.differing(tmp_path / "old", tmp_path / "new") == ["old/b.py", "old/d.pyi"]
