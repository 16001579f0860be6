"""Rules that hold for the whole tree: sizes, places, names, what may stand in a tracked file."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES_MAX = 500

BANNED_NAMES = re.compile(r"(^|_)(utils?|helpers?|managers?|misc|common)$")

# Folders of particular machines. Written in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile(r"(?<![\w.$}-])/(?:work|farm|home/\w+|Users/\w+)" + "/")

# Hosts that package clients talk to: a clone behind a mirror must never have to reach one that we name.
REGISTRY_HOSTS = re.compile(
    "|".join(
        re.escape(".".join(parts))
        for parts in (
            ("pypi", "org"),
            ("files", "pythonhosted", "org"),
            ("deb", "debian", "org"),
            ("security", "debian", "org"),
            ("archive", "ubuntu", "com"),
            ("proxy", "golang", "org"),
            ("sum", "golang", "org"),
            ("registry", "npmjs", "org"),
            ("docker", "io/library"),
            ("snapshot", "debian", "org"),
        )
    )
)


@cache
def tracked() -> tuple[str, ...]:
    """Files of the repository: what git would commit. Outside a clone, everything that is not a cache."""
    names = set(of_git() or (str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()))
    return tuple(
        sorted(
            name
            for name in names
            if not re.search(r"(^|/)(\.\w[\w-]*|__pycache__)/", name) and (ROOT / name).is_file()
        )
    )


def of_git() -> list[str]:
    """Nothing where this is no clone or the machine has no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []


@cache
def text_of(name: str) -> str:
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def own_python(*tops: str) -> list[str]:
    return [
        name
        for name in tracked()
        if name.endswith(".py") and name.split("/")[0] in tops and "/wire/" not in name
    ]


def test_no_tracked_file_names_a_folder_of_a_particular_machine() -> None:
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name in tracked()
        for number, line in enumerate(text_of(name).splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert found == []


def test_no_tracked_file_names_the_host_of_a_package_registry() -> None:
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name in tracked()
        for number, line in enumerate(text_of(name).splitlines(), 1)
        if REGISTRY_HOSTS.search(line)
    ]
    assert found == []


def test_no_source_file_is_longer_than_a_reader_takes_in() -> None:
    long = {
        name: lines
        for name in own_python("src", "scripts", "bench")
        if (lines := text_of(name).count("\n")) > LINES_MAX
    }
    assert long == {}


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [
        name for name in own_python("src", "tests", "bench") if BANNED_NAMES.search(Path(name).stem)
    ] == []


def test_every_source_file_says_what_it_is_for() -> None:
    silent = [
        name
        for name in own_python("src", "scripts", "bench")
        if text_of(name).strip() and ast.get_docstring(ast.parse(text_of(name))) is None
    ]
    assert silent == []


def test_no_source_file_leaves_something_for_later() -> None:
    word = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
    found = [
        f"{name}:{number}"
        for name in own_python("src", "tests", "bench", "scripts")
        for number, line in enumerate(text_of(name).splitlines(), 1)
        if word.search(line)
    ]
    assert found == []


def test_every_module_is_reached_from_a_test() -> None:
    """Directly or through what a test imports; a module that no test reaches is dead or unproven."""
    modules = {module_of(name): name for name in own_python("src")}
    waiting = {module for name in own_python("tests") for module in modules_imported(text_of(name))}
    waiting |= set(
        re.findall(r'^[\w-]+ = "([\w.]+):\w+"$', text_of("pyproject.toml"), re.MULTILINE)
    )  # console scripts
    reached: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in modules and module not in reached:
            reached.add(module)
            source = text_of(modules[module])
            waiting |= modules_imported(source) | modules_named(source) | {module.rpartition(".")[0]}
    unreached = [modules[module] for module in modules.keys() - reached if not module.endswith("__main__")]
    assert sorted(name for name in unreached if not is_docstring_only(name)) == []


def module_of(name: str) -> str:
    return ".".join(Path(name).relative_to("src").with_suffix("").parts).removesuffix(".__init__")


def is_docstring_only(name: str) -> bool:
    return len(ast.parse(text_of(name)).body) <= 1


def modules_imported(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def modules_named(source: str) -> set[str]:
    """What is imported late, by name: "sandshift.cli.run:run"."""
    return set(re.findall(r'"((?:sandshift|ttrpc)(?:\.\w+)+)[":]', source))


def test_links_between_the_documents_lead_somewhere() -> None:
    broken = [
        f"{name} -> {target}"
        for name in tracked()
        if name.endswith(".md")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(name))
        if "://" not in target and not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert broken == []


def test_the_documents_index_lists_every_page() -> None:
    pages = {name.removeprefix("docs/") for name in tracked() if re.fullmatch(r"docs/(?!adr/).+\.md", name)}
    index = text_of("docs/README.md")
    assert sorted(page for page in pages - {"README.md"} if f"]({page})" not in index) == []


def test_the_decisions_index_lists_every_decision() -> None:
    index = text_of("docs/adr/README.md")
    decisions = [Path(name).name for name in tracked() if re.fullmatch(r"docs/adr/\d{4}-.+\.md", name)]
    assert decisions != []
    assert [name for name in decisions if f"]({name})" not in index] == []


@pytest.mark.parametrize("name", ["run", ".ci/run", "scripts/generate"])
def test_scripts_are_executable_and_parse(name: str) -> None:
    path = ROOT / name
    assert path.stat().st_mode & 0o111, f"{name} is not executable"
    shell = "bash" if "bash" in path.read_text().splitlines()[0] else "sh"
    checked = subprocess.run([shell, "-n", path], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
