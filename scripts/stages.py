"""What `./run test` and `./run check` do, stage by stage, each with its clock.

A stage is a command; the first that fails ends the run and is named. The last line adds up all stages:
`N passed, N failed`, where a stage of pytest counts its tests and any other stage counts one.

Lanes are rows of stages that run side by side, for two cores: what a stage in a lane says is kept in its log and told when it has ended.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / ".cache" / "results"
CLEAN_UP_S: Final = 25.0
OPTIONAL: Final = "optional: "
"""How the reason of a skip begins that is right in CI too: "optional: needs KVM"."""
NOTHING_TO_TEST: Final = "got empty parameter set"
"""pytest's own words for a list of past failures that is empty."""
FAULTS_SEED: Final = "12"
"""Which cases of the matrix of faults CI plays: each victim once, and every chapter of the matrix."""
SILENT: Final = "brownout, second pass: channel silent"
"""The one case in which QEMU 10.0 hangs as a whole: no sample may leave it out."""
_running: Final[set[subprocess.Popen[bytes]]] = set()
_stopping: Final = threading.Event()
_mouth: Final = threading.Lock()
GENERATED: Final = ("src/sandshift/wire", "src/ttrpc/wire")


@dataclass(frozen=True, slots=True)
class Counts:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        text = f"{self.passed} passed, {self.failed} failed"
        return f"{text}, {self.skipped} skipped" if self.skipped else text


@dataclass(frozen=True, slots=True)
class Stage:
    """One command. `bound_s` is how long it may take before it is ended and counts as failed."""

    name: str
    arguments: tuple[str, ...]
    bound_s: float = 300.0
    is_pytest: bool = field(default=False)


@dataclass(frozen=True, slots=True)
class Lanes:
    """Rows of stages that need nothing of one another; in a row, one stage after the other up to the first that fails."""

    rows: tuple[tuple[Stage, ...], ...]


def pytest_stage(name: str, *arguments: str, bound_s: float) -> Stage:
    # -p no:cacheprovider: a run as root leaves no cache that the user's next run cannot write.
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={RESULTS / name}.xml")
    return Stage(name, (*command, *arguments), bound_s, is_pytest=True)


FORMAT: Final = (
    Stage("format", ("ruff", "format", "--check", "--quiet")),
    Stage("lint", ("ruff", "check", "--quiet")),
)
MEANING: Final = (
    Stage("types", ("mypy",)),
    Stage("imports", ("lint-imports",)),
    Stage("generated", (sys.executable, __file__, "compare-generated")),
)
CHECK: Final = (*FORMAT, *MEANING)
MARKS: Final = "not vm and not full and not containerd"
HALF: Final = ("tests/conformance", "tests/explore", "tests/shim", "tests/sim")
"""Folders whose tests take about as long as all others: none needs root, a network of its own, or what the others make."""
FAST: Final = (
    *FORMAT,
    Lanes(
        (
            (
                pytest_stage("tests-shim", *HALF, "-m", MARKS, bound_s=600),
                Stage("sim", (sys.executable, "-m", "tests.sim", "--seconds", "5"), bound_s=120),
            ),
            (
                *MEANING,
                Stage("go-program", (sys.executable, "-m", "tests.interop.toolchain"), bound_s=600),
                pytest_stage("tests", *(f"--ignore={folder}" for folder in HALF), "-m", MARKS, bound_s=600),
                Stage("fuzz", (sys.executable, "-m", "tests.fuzz.ttrpc", "--inputs", "3000"), bound_s=300),
            ),
        )
    ),
)
DEFAULT: Final = (
    *FAST,
    pytest_stage("vm-tests", "-m", "vm and not full and not containerd", bound_s=1800),
)
CONTAINERD: Final = (pytest_stage("containerd", "-m", "containerd", bound_s=900),)
FULL: Final = (
    pytest_stage("full-tests", "-m", "full and not containerd", bound_s=2400),
    *CONTAINERD,
    Stage("sim", (sys.executable, "-m", "tests.sim", "--seconds", "120"), bound_s=500),
    Stage(
        "faults", (sys.executable, "-m", "tests.faults", "--sample", "12", "--seed", FAULTS_SEED), bound_s=900
    ),
    Stage(
        "faults-silent", (sys.executable, "-m", "tests.faults", "--no-control", "--only", SILENT), bound_s=300
    ),
    Stage("explore", (sys.executable, "-m", "tests.explore"), bound_s=1500),
)
LEVELS: Final[dict[str, tuple[Stage | Lanes, ...]]] = {
    "check": CHECK,
    "fast": FAST,
    "default": DEFAULT,
    "full": FULL,
    "containerd": CONTAINERD,
}


def compare_generated() -> int:
    """Generate into a scratch copy and compare: 0 when what is committed is current."""
    with tempfile.TemporaryDirectory(prefix="sandshift-generated-") as scratch:
        copy = Path(scratch)
        for folder in ("proto", "src", "scripts"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        environment = {**os.environ, "SANDSHIFT_VENV": str(ROOT / os.environ.get("SANDSHIFT_VENV", ".venv"))}
        subprocess.run([copy / "scripts" / "generate"], env=environment, check=True, timeout=120)
        stale = [name for folder in GENERATED for name in differing(ROOT / folder, copy / folder)]
    for name in stale:
        print(f"{name} is not what proto/ gives: ./run gen, then commit it", file=sys.stderr)
    return 1 if stale else 0


def differing(committed: Path, fresh: Path) -> list[str]:
    """Paths below the two folders whose bytes differ or which only one of them has; compiled files are not looked at."""
    names = {
        path.relative_to(folder)
        for folder in (committed, fresh)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in {".py", ".pyi"}
    }
    return sorted(
        str((committed / name).relative_to(ROOT))
        for name in names
        if not ((committed / name).exists() and (fresh / name).exists())
        or not filecmp.cmp(committed / name, fresh / name, shallow=False)
    )


def run(stage: Stage, log: IO[bytes] | None = None) -> Counts:
    """Run one stage to its end or its bound; its output goes to `log`, or to ours."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{stage.name}.xml").unlink(missing_ok=True)
    code = exit_code(stage, log)
    if not stage.is_pytest:
        return Counts(passed=1) if code == 0 else Counts(failed=1)
    counts = pytest_counts(RESULTS / f"{stage.name}.xml")
    return counts if code == 0 or counts.failed else counts + Counts(failed=1)


def exit_code(stage: Stage, log: IO[bytes] | None = None) -> int:
    """The command's exit status; 127 when there is no such program, 124 when it had to be ended.

    The command leads a process group of its own. When its time is up, or ours is (Ctrl-C, SIGTERM), the whole group is
    interrupted first, so that fixtures end the machines and namespaces that they started, and killed after CLEAN_UP_S.
    """
    try:
        process = subprocess.Popen(
            stage.arguments, cwd=ROOT, process_group=0, stdout=log, stderr=subprocess.STDOUT if log else None
        )
    except FileNotFoundError:
        print(f"stage {stage.name}: {stage.arguments[0]} is not installed: ./run setup fast", file=sys.stderr)
        return 127
    _running.add(process)
    try:
        return process.wait(stage.bound_s)
    except subprocess.TimeoutExpired:
        print(f"stage {stage.name}: ended after its bound of {stage.bound_s:.0f} s", file=sys.stderr)
        end_group(process)
        return 124
    except KeyboardInterrupt:
        end_group(process)
        raise
    finally:
        _running.discard(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CLEAN_UP_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pytest_counts(report: Path) -> Counts:
    """What a JUnit report says; nothing when there is none, as after a crash.

    In CI nothing may be left out unnoticed: there a skipped test counts as failed, unless its reason begins with OPTIONAL.
    """
    try:
        suite = ET.parse(report).getroot().find("testsuite")  # noqa: S314 - written by our own pytest
    except (OSError, ET.ParseError):
        suite = None
    if suite is None:
        return Counts()
    tests, failures, errors, skipped = (
        int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")
    )
    counts = Counts(tests - failures - errors - skipped, failures + errors, skipped)
    if not os.environ.get("CI"):
        return counts
    forbidden = list(needed_but_skipped(suite))
    for line in forbidden:
        print(f"skipped in CI: {line}", file=sys.stderr)
    return counts + Counts(failed=len(forbidden), skipped=-len(forbidden))


def needed_but_skipped(suite: ET.Element) -> Iterator[str]:
    """One line for each skipped test whose reason does not begin with OPTIONAL."""
    for case in suite.iter("testcase"):
        skip = case.find("skipped")
        if skip is not None and not (reason := reason_of(skip)).startswith((OPTIONAL, NOTHING_TO_TEST)):
            yield f"{case.get('classname')}::{case.get('name')}: {reason}"


def reason_of(skip: ET.Element) -> str:
    """Of one test, or of a whole file that was skipped as it was read: pytest then has it in the text, as a tuple."""
    reason = skip.get("message", "")
    if reason == "collection skipped":
        return (skip.text or "").partition("Skipped: ")[2].rstrip("')\"") or reason
    return reason


def run_all(stages: tuple[Stage | Lanes, ...], *, keep_going: bool) -> int:
    """Run the stages in order, all of them when `keep_going`, else up to the first that fails; 0 when none failed."""
    total = Counts()
    for stage in stages:
        if isinstance(stage, Lanes):
            counts = run_lanes(stage)
        else:
            say(f"== {stage.name}")
            counts = run_timed(stage)
        total += counts
        if counts.failed and not keep_going:
            if isinstance(stage, Stage):
                say(f"stage {stage.name} failed: the stages after it were not run")
            break
    print(total, flush=True)
    return 1 if total.failed else 0


def run_timed(stage: Stage, log: IO[bytes] | None = None) -> Counts:
    started_s = time.monotonic()
    counts = run(stage, log)
    if log is not None:
        tell(log)
    verdict = "FAILED" if counts.failed else "ok"
    say(f"== {stage.name}: {verdict}, {time.monotonic() - started_s:.1f} s")
    return counts


def run_lanes(lanes: Lanes) -> Counts:
    """A failure ends its row; the other rows go on to their ends, so that all that can be said is said at once."""
    with ThreadPoolExecutor(len(lanes.rows)) as pool:
        try:
            return sum(pool.map(run_row, lanes.rows), Counts())
        except KeyboardInterrupt:
            _stopping.set()
            for process in tuple(_running):
                end_group(process)
            raise


def run_row(row: tuple[Stage, ...]) -> Counts:
    total = Counts()
    for stage in row:
        if _stopping.is_set():
            break
        say(f"== {stage.name}: beside others, {RESULTS / stage.name}.log")
        RESULTS.mkdir(parents=True, exist_ok=True)
        with (RESULTS / f"{stage.name}.log").open("w+b") as log:
            total += run_timed(stage, log)
        if total.failed:
            say(f"stage {stage.name} failed: the stages after it in its row were not run")
            break
    return total


def say(line: str) -> None:
    with _mouth:
        print(line, file=sys.stderr, flush=True)


def tell(log: IO[bytes]) -> None:
    """What a stage has said, in one piece."""
    log.seek(0)
    with _mouth:
        sys.stderr.write(log.read().decode(errors="replace"))
        sys.stderr.flush()


def main(arguments: list[str]) -> int:
    if arguments == ["compare-generated"]:
        return compare_generated()
    if len(arguments) != 1 or arguments[0] not in LEVELS:
        print(f"usage: stages.py {'|'.join(LEVELS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: clean up as for Ctrl-C
    try:
        return run_all(LEVELS[arguments[0]], keep_going=arguments[0] == "check")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
