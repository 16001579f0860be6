"""What `start` knows without reading the configuration, and the launcher that containerd runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandshift.config import Config, Places
from sandshift.errors import Rejected
from sandshift.shim import ground, launcher
from sandshift.shim.arguments import Arguments
from sandshift.shim.start import answer_of_start

CONFIG = '[places]\nrun_dir = "/tmp/run"\n[host]\nnetwork_namespace = "a"\n'


@pytest.fixture
def memo_dir(tmp_path: Path) -> str:
    return str(tmp_path / "memo")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG)
    monkeypatch.setenv("SANDSHIFT_CONFIG", str(path))
    return path


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Config:
        raise AssertionError("the configuration was read")

    monkeypatch.setattr("sandshift.config.load", load)


def test_a_second_start_does_not_read_the_configuration(
    config: Path, memo_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground.find_ground(memo_dir)
    forbid_loading(monkeypatch)
    found = ground.find_ground(memo_dir)
    assert (found.run_dir, found.network_namespace) == ("/tmp/run", "a")


def test_a_configuration_that_has_changed_is_read_again(config: Path, memo_dir: str) -> None:
    ground.find_ground(memo_dir)
    config.write_text(CONFIG.replace("/tmp/run", "/tmp/other"))
    assert ground.find_ground(memo_dir).run_dir == "/tmp/other"


def test_a_wrong_configuration_is_an_error_each_time(config: Path, memo_dir: str) -> None:
    config.write_text("[places]\nwhat = 1\n")
    for _ in range(2):
        with pytest.raises(Rejected, match="what"):
            ground.find_ground(memo_dir)


def test_memos_that_others_could_write_are_not_believed(config: Path, memo_dir: str) -> None:
    ground.find_ground(memo_dir)
    stamp = Path(memo_dir, next(Path(memo_dir).iterdir())).read_text().split("\n")[0]
    assert ground.recall(memo_dir, f"config{config}", stamp) == ["/tmp/run", "a"]
    Path(memo_dir).chmod(0o777)
    assert ground.recall(memo_dir, f"config{config}", stamp) is None


@pytest.mark.parametrize("length", [3, 76])
def test_the_socket_is_where_everybody_else_looks_for_it(tmp_path: Path, length: int) -> None:
    config = Config(places=Places(run_dir=str(tmp_path)))
    sandbox_id = "s" * length
    assert ground.Ground.of(config).shim_socket("k8s.io", sandbox_id) == str(
        config.shim_socket("k8s.io", sandbox_id)
    )


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("containerd github.com/containerd/containerd/v2 2.1.9+unknown", 3),
        ("containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24", 2),
        ("containerd github.com/containerd/containerd v2.3.4 abc", 3),
        ("something else", 2),
    ],
)
def test_a_containerd_gets_the_newest_version_that_it_takes_and_is_asked_once(
    tmp_path: Path, memo_dir: str, says: str, version: int
) -> None:
    binary, asked = tmp_path / "containerd", tmp_path / "asked"
    binary.write_text(f"#!/bin/sh\necho >> {asked}\necho '{says}'\n")
    binary.chmod(0o755)
    arguments = Arguments("start", "k8s.io", "box", publish_binary=str(binary))
    for _ in range(2):
        answer = answer_of_start(
            "unix:///s",
            stdin=b"",
            arguments=arguments,
            environment={"MAX_SHIM_VERSION": "2"},
            ground=ground.Ground("/run", "", memo_dir),
        )
        assert answer.startswith(f'{{"version": {version}, '.encode())
    assert asked.read_text() == "\n"


def test_start_loads_neither_asyncio_nor_protobuf_nor_what_is_slow_in_the_library() -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(folder) for folder in launcher.folders_of_ours()]!r}\n"
        "import sandshift.shim.bootstrap, sandshift.shim.ground, sandshift.shim.start\n"
        "print(*sys.modules)"
    )
    ran = subprocess.run(
        [launcher.interpreter(), "-IS", "-c", code], capture_output=True, text=True, check=True
    )
    slow = {
        "asyncio",
        "google.protobuf",
        "typing",
        "re",
        "json",
        "socket",
        "pathlib",
        "dataclasses",
        "tomllib",
    }
    assert slow & set(ran.stdout.split()) == set()


def test_the_launcher_runs_isolated_and_finds_what_it_needs(tmp_path: Path) -> None:
    path = launcher.install(tmp_path)
    ran = subprocess.run([path, "-v"], cwd="/", env={}, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("containerd-shim-sandshift-v2:\n  Version:  ")
    assert path.read_text().splitlines()[0] == f"#!{os.path.realpath(sys.executable)} -IS"
