"""The shim's command line, what `start` prints for which containerd, and what is written by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp

from sandshift.errors import Rejected, Unavailable
from sandshift.shim.arguments import Arguments, parse_arguments
from sandshift.shim.by_hand import length_delimited, protobuf_strings, varint
from sandshift.shim.delete import delete_response, kill_by_pid_file
from sandshift.shim.durable import AppendOnlyFile, write_atomically
from sandshift.shim.identity import started_ticks_of
from sandshift.shim.info import runtime_info
from sandshift.shim.start import answer_of_start, bind

BOOTSTRAP_PARAMS = length_delimited(1, b"box") + length_delimited(2, b"k8s.io") + b"\x18\x00"
ARGUMENTS = Arguments(action="start", namespace="k8s.io", id="box")


@pytest.mark.parametrize("dash", ["-", "--"])
def test_flags_are_go_s_with_one_dash_or_two_and_the_action_last(dash: str) -> None:
    line = [
        f"{dash}namespace",
        "k8s.io",
        f"{dash}address=/run/c.sock",
        f"{dash}id",
        "box",
        f"{dash}debug",
        "start",
    ]
    parsed = parse_arguments(line)
    assert parsed == Arguments("start", "k8s.io", "box", "/run/c.sock", debug=True)


@pytest.mark.parametrize(
    ("line", "named"), [(["-what", "start"], "-what"), (["stop"], "stop"), (["start", "delete"], "delete")]
)
def test_a_word_that_is_not_understood_is_named(line: list[str], named: str) -> None:
    with pytest.raises(Rejected, match=named):
        parse_arguments(line)


def test_containerd_1_6_gets_a_plain_address() -> None:
    assert answer_of_start("unix:///s", stdin=b"", arguments=ARGUMENTS, environment={}) == b"unix:///s"


@pytest.mark.parametrize(("stdin", "version"), [(b"", 2), (BOOTSTRAP_PARAMS, 3)])
def test_newer_ones_get_json_with_the_newest_version_they_take(stdin: bytes, version: int) -> None:
    answer = answer_of_start(
        "unix:///s", stdin=stdin, arguments=ARGUMENTS, environment={"MAX_SHIM_VERSION": "2"}
    )
    assert json.loads(answer) == {"version": version, "address": "unix:///s", "protocol": "ttrpc"}


def test_an_any_of_options_is_not_taken_for_bootstrap_params() -> None:
    options = AnyMessage(type_url="runc.Options", value=b"k8s.io").SerializeToString()
    answer = answer_of_start(
        "unix:///s", stdin=options, arguments=ARGUMENTS, environment={"MAX_SHIM_VERSION": "2"}
    )
    assert json.loads(answer)["version"] == 2


@pytest.mark.parametrize("rubbish", [b"\xff", b"\x0a\xff", b"\x0b", b"\x0a\x05abc"])
def test_rubbish_on_standard_input_is_read_as_nothing(rubbish: bytes) -> None:
    assert protobuf_strings(rubbish) == {}


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 1 << 40])
def test_a_delete_response_is_what_protobuf_would_write(value: int) -> None:
    stamp = Timestamp(seconds=value, nanos=7).SerializeToString()
    by_hand = delete_response(exit_status=137, now_ns=value * 1_000_000_000 + 7)
    assert protobuf_strings(by_hand)[3].replace(b"\x08\x00", b"") == stamp
    assert by_hand.startswith(b"\x10" + varint(137))


def test_info_names_the_runtime() -> None:
    told = protobuf_strings(runtime_info())
    assert told[1] == b"io.containerd.sandshift.v2"
    assert protobuf_strings(told[5]) == {
        1: b"containerd.io/runtime-allow-mounts",
        2: b"erofs,ext4,format/*,mkdir/*,overlay",
    }


def test_a_living_shim_keeps_its_socket_and_a_dead_one_s_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "shim.sock"
    first = bind(path)
    assert first is not None
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert bind(path) is None
    first.close()
    second = bind(path)
    assert second is not None
    second.close()


def test_a_place_that_cannot_be_used_is_named_with_a_remedy() -> None:
    with pytest.raises(Unavailable, match=r"places\.run_dir"):
        bind(Path("/proc/nowhere/shim.sock"))


def test_a_pid_that_now_means_another_process_is_not_killed(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        record = tmp_path / "shim.pid"
        record.write_text(
            json.dumps({"pid": sleeper.pid, "started_ticks": started_ticks_of(sleeper.pid) + 1})
        )
        kill_by_pid_file(record)
        assert sleeper.poll() is None
        record.write_text(json.dumps({"pid": sleeper.pid, "started_ticks": started_ticks_of(sleeper.pid)}))
        kill_by_pid_file(record)
        assert sleeper.wait(10) == -9
    finally:
        sleeper.kill()
        sleeper.wait()
    assert started_ticks_of(sleeper.pid) == -1


def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_an_append_that_the_disk_refuses_leaves_nothing_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AppendOnlyFile(tmp_path / "journal")
    file.append(b"first")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(Unavailable, match="No space left on device"):
        file.append(b"second")
    assert (tmp_path / "journal").read_bytes() == b"first"
    file.close()
