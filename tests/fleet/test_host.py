"""Hosts, and the address that a shim prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandshift.config import parse
from sandshift.errors import NotSupported, PeerProtocolError, Rejected, TimedOut
from sandshift.fleet import host as host_module
from sandshift.fleet.host import Host, parse_address, start_shim


@pytest.mark.parametrize(
    "printed",
    [
        b"unix:///run/x.sock",
        b"unix:///run/x.sock\n",
        b'{"version": 2, "address": "unix:///run/x.sock", "protocol": "ttrpc"}',
    ],
)
def test_the_address_is_read_plain_and_from_containerds_json(printed: bytes) -> None:
    assert parse_address(printed) == "unix:///run/x.sock"


@pytest.mark.parametrize("printed", [b"", b"warning: x", b"{}", b"{", b'{"address": 7}', b"tcp://x"])
def test_what_is_no_address_is_quoted_in_the_error(printed: bytes) -> None:
    with pytest.raises(PeerProtocolError, match="which is no address"):
        parse_address(printed)


def host_at(folder: Path, name: str = "a") -> Host:
    places = {"run_dir": f"{folder}/{name}/run", "state_dir": f"{folder}/{name}/state"}
    return Host(parse({"host": {"name": name}, "places": places}, source=name), folder / "config.toml")


def program(folder: Path, script: str) -> str:
    path = folder / "shim"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def test_a_shim_is_started_with_its_hosts_configuration_and_nothing_of_containerds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'echo "$@" >{tmp_path}/args; env >{tmp_path}/env; echo unix:///x'
    path = program(tmp_path, script)
    monkeypatch.setattr(host_module, "shim_program", lambda: path)
    monkeypatch.setenv("MAX_SHIM_VERSION", "2")
    monkeypatch.setenv("SANDSHIFT_CONFIG", "/somebody/elses")
    assert await start_shim(host_at(tmp_path), "default", "s-1") == "unix:///x"
    assert (tmp_path / "args").read_text() == "-namespace default -id s-1 -address  start\n"
    environment = (tmp_path / "env").read_text()
    assert f"SANDSHIFT_CONFIG={tmp_path}/config.toml\n" in environment
    assert "MAX_SHIM_VERSION" not in environment


async def test_a_shim_that_refuses_to_start_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(
        tmp_path, 'echo "containerd-shim-sandshift-v2: places.run_dir cannot be written" >&2; exit 1'
    )
    monkeypatch.setattr(host_module, "shim_program", lambda: path)
    with pytest.raises(Rejected, match=r"^host a: places\.run_dir cannot be written$"):
        await start_shim(host_at(tmp_path), "default", "s-1")


async def test_a_shim_that_says_nothing_is_given_up_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path, f"echo $$ >{tmp_path}/pid; exec sleep 60")
    monkeypatch.setattr(host_module, "shim_program", lambda: path)
    monkeypatch.setattr(host_module, "SHIM_START_S", 0.3)
    with pytest.raises(
        TimedOut,
        match=r"sandbox s-1 on host a said nothing for 0\.3 s; look at .*/a/run/default/s-1/shim\.log",
    ):
        await start_shim(host_at(tmp_path), "default", "s-1")
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_a_missing_shim_program_is_named_with_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotSupported, match=r"is neither beside .*/python nor on PATH"):
        host_module.shim_program()


def test_two_hosts_are_the_same_place_if_their_sockets_or_their_state_would_be_the_same_files(
    tmp_path: Path,
) -> None:
    a, b = host_at(tmp_path, "a"), host_at(tmp_path, "b")
    assert not a.is_same_place_as(b)
    assert a.is_same_place_as(host_at(tmp_path, "a"))
