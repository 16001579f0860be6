"""The configuration file: read once, checked whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandshift import config
from sandshift.errors import Rejected


def test_a_file_that_is_not_there_gives_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(config.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "absent.toml")
    assert config.load() == config.Config()


def test_the_path_given_is_taken_before_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, mib in (("given", 300), ("variable", 400)):
        (tmp_path / name).write_text(f"[vm]\nmemory_mib = {mib}\n")
    monkeypatch.setenv(config.PATH_VARIABLE, str(tmp_path / "variable"))
    assert config.load(tmp_path / "given").vm.memory_mib == 300
    assert config.load().vm.memory_mib == 400


def test_a_named_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match=r"absent\.toml cannot be read: .*No such file"):
        config.load(tmp_path / "absent.toml")


def test_what_is_not_toml_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("memory: 12")
    with pytest.raises(Rejected, match=r"c\.toml is not TOML"):
        config.load(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"vm": {"memory": 1}}, "unknown field `memory`"),
        ({"vm": {"memory_mib": "many"}}, r"Expected `int`, got `str` - at `\$\.vm\.memory_mib`"),
        ({"vm": {"memory_mib": 95}}, "vm.memory_mib = 95 is outside 96 to 1048576"),
        ({"vm": {"vcpus": 0}}, "vm.vcpus = 0 is outside 1 to 64"),
        ({"vm": {"machine_type": "q35"}}, "vm.machine_type = 'q35' must be a versioned type"),
        ({"migration": {"downtime_limit_ms": 0}}, "migration.downtime_limit_ms = 0 is outside 1 to 2000000"),
        ({"migration": {"encryption": "none"}}, r"Invalid enum value 'none'"),
        (
            {"migration": {"limits": {"stall_s": 0}}},
            "migration.limits.stall_s = 0.0 must be a finite number greater than 0",
        ),
        (
            {"migration": {"limits": {"stall_s": float("nan")}}},
            "migration.limits.stall_s = nan must be a finite number greater than 0",
        ),
        ({"places": {"run_dir": "here"}}, "places.run_dir = 'here' must be an absolute path"),
    ],
)
def test_a_wrong_key_or_value_is_named(document: dict[str, object], named: str) -> None:
    with pytest.raises(Rejected, match=named) as raised:
        config.parse(document, source="test.toml")
    assert raised.value.message.startswith("configuration test.toml: ")


def test_all_problems_are_named_at_once() -> None:
    document = {"vm": {"memory_mib": 1, "vcpus": 99}, "places": {"state_dir": "x"}}
    with pytest.raises(Rejected) as raised:
        config.parse(document, source="test.toml")
    assert raised.value.message.count("; ") == 2


def test_a_sandbox_has_its_places_under_the_hosts() -> None:
    host = config.parse({"places": {"run_dir": "/r", "state_dir": "/s"}}, source="test.toml")
    assert host.sandbox_run_dir("default", "s-1") == Path("/r/default/s-1")
    assert host.sandbox_state_dir("default", "s-1") == Path("/s/sandboxes/default/s-1")


def test_a_host_without_a_name_is_called_as_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.Config(host=config.Host(name="left")).host_name == "left"
    assert config.Config().host_name != ""
