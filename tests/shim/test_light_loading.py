"""What a shim has loaded when it answers its first call, what it loads before it moves, and that nothing is missing.

A module that comes back into the first set costs every pod of a host its memory: think before you add it to the lists here.
"""

from __future__ import annotations

import ast
import asyncio
import gc
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import sandshift
import ttrpc
from sandshift.shim import launcher
from sandshift.shim.migration import desk
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.containerd.sandbox_ttrpc import SandboxClient
from tests.shim.house import two_hosts

SOURCE: Final = Path(sandshift.__file__).parent
PURE_PROTOBUF: Final = "google.protobuf.internal.python_message"
END_S: Final = 20.0
LOAD: Final = f"""import sys
sys.path[:0] = {[str(folder) for folder in launcher.folders_of_ours()]!r}
from sandshift.shim.lightly import load_lightly
load_lightly()
"""
SERVE: Final = """
from sandshift.shim.arguments import Arguments
from sandshift.shim.serve import serve_from_start
serve_from_start(Arguments("start", "test", "box"), int(sys.argv[1]))
print(*sys.modules)
"""
HEAVY: Final = {
    "ssl", "_ssl", "_hashlib", "hashlib", "secrets", "random", "pickle", "ctypes", "shutil", "lzma", "bz2", "json.tool", "argparse",
    "typing_extensions", "qemu", "qemu.qmp", "google.protobuf.text_format", "google.protobuf.json_format", PURE_PROTOBUF,
}  # fmt: skip
"""Libraries that are slow or large, and wanted by nobody before there is a sandbox."""
OURS_AT_FIRST: Final = {
    f"sandshift.{name}"
    for name in (
        "config", "errors", "identifiers", "sandbox", "sandbox.model", "session", "session.states", "status", "shim",
        "shim.arguments", "shim.durable", "shim.haste", "shim.headless", "shim.identity", "shim.late", "shim.lightly", "shim.log",
        "shim.migration", "shim.migration.desk", "shim.migration.last", "shim.own_socket", "shim.parts", "shim.places",
        "shim.sandbox", "shim.sandbox_service", "shim.serve", "shim.stopwatch", "shim.tasks", "shim.tasks.events",
    )
}  # fmt: skip
"""Of sandshift's own modules, beside the generated ones."""


def said(code: str, environment: dict[str, str] | None = None) -> str:
    """What this code prints after the loading, in an interpreter as the launcher begins it."""
    ran = subprocess.run(
        [launcher.interpreter(), "-IS", "-c", LOAD + code],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.strip()


# Before the first answer


async def loaded_at_the_first_answer(folder: Path) -> set[str]:
    """The modules of a shim that has answered SandboxStatus and was told to end."""
    (folder / "config.toml").write_text(
        f'[places]\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\ncache_dir = "{folder}/cache"\n'
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/shim.sock")
        listener.listen()
        shim = subprocess.Popen(
            [launcher.interpreter(), "-IS", "-c", LOAD + SERVE, str(listener.fileno())],
            cwd=folder,
            env={"SANDSHIFT_CONFIG": f"{folder}/config.toml"},
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
    try:
        client = await ttrpc.connect(f"{folder}/shim.sock", timeout_s=END_S)
        status = await SandboxClient(client).sandbox_status(
            sandbox_pb2.SandboxStatusRequest(sandbox_id="box"), timeout_s=END_S
        )
        assert status.state == "SANDBOX_NOTREADY"
        await client.close()
        shim.send_signal(signal.SIGTERM)
        told, _ = await asyncio.to_thread(shim.communicate, timeout=END_S)
    finally:
        shim.kill()
        shim.wait()
    assert shim.returncode == 0
    return set(told.split())


async def test_a_shim_answers_its_first_call_without_what_a_sandbox_needs(tmp_path: Path) -> None:
    loaded = await loaded_at_the_first_answer(tmp_path)
    assert {"asyncio", "google._upb._message", "ttrpc.aio.server", "sandshift.shim.sandbox"} <= loaded
    assert loaded & HEAVY == set()
    ours = {
        name for name in loaded if name.startswith("sandshift.") and not name.startswith("sandshift.wire")
    }
    assert ours - OURS_AT_FIRST == set()


def test_nothing_is_loaded_before_the_callers_pipes_are_let_go() -> None:
    serving = next(
        node
        for node in parsed(SOURCE / "shim" / "start.py").body
        if isinstance(node, ast.FunctionDef) and node.name == "_serve"
    )
    detached = next(
        node.lineno
        for node in ast.walk(serving)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_detach"
    )
    imports = [node.lineno for node in ast.walk(serving) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(imports) >= 3
    assert min(imports) > detached


def test_messages_of_every_kind_work_without_protobufs_second_core() -> None:
    code = """
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from sandshift.wire.containerd import sandbox_pb2
stamp = Timestamp()
stamp.FromNanoseconds(1_500_000_000)
length = Duration()
length.FromJsonString("2.5s")
packed = Any()
packed.Pack(sandbox_pb2.SandboxStatusResponse(sandbox_id="box", info={"a": "b"}, created_at=stamp))
found = sandbox_pb2.SandboxStatusResponse()
assert Any.FromString(packed.SerializeToString()).Unpack(found)
print(found.sandbox_id, dict(found.info), found.created_at.ToNanoseconds(), length.ToNanoseconds())
"""
    assert said(code) == "box {'a': 'b'} 1500000000 2500000000"


def test_what_was_left_out_can_be_loaded_later() -> None:
    code = """
import ssl
from google.protobuf import json_format, text_format
from google.protobuf.internal import python_message
from sandshift.wire.containerd import sandbox_pb2
request = sandbox_pb2.SandboxStatusRequest(sandbox_id="box")
print(hasattr(ssl, "SSLContext"), hasattr(python_message, "GeneratedProtocolMessageType"))
print(text_format.MessageToString(request).strip(), json_format.MessageToJson(request, indent=None))
"""
    assert said(code).splitlines() == ["True True", 'sandbox_id: "box" {"sandboxId": "box"}']


def test_where_protobuf_has_no_compiled_core_its_pure_one_is_loaded() -> None:
    code = """
from sandshift.wire.containerd import sandbox_pb2
data = sandbox_pb2.SandboxStatusRequest(sandbox_id="box").SerializeToString()
print(sandbox_pb2.SandboxStatusRequest.FromString(data).sandbox_id)
"""
    assert said(code, {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}) == "box"


# Before a move

ROOMS_OF_A_MOVE: Final = ("shim", "session", "sandbox", "vmm", "guest", "link", "net", "rootfs")
NOT_IN_A_MOVE: Final = frozenset(
    f"shim/{name}.py"
    for name in ("arguments", "bootstrap", "delete", "ground", "grouping", "lightly", "start")
)
"""Files of processes that serve nothing, or of the time before a shim serves."""
NEVER_IN_A_MOVE: Final = frozenset({("shim/machines.py", "sandshift.guest.warmth")})
"""Only who makes a template wants it, in the start of a sandbox's VM."""


def late_imports() -> Iterator[tuple[str, str]]:
    """File and module of every import that stands in a function and not at the top of its file."""
    for path in (path for room in ROOMS_OF_A_MOVE for path in sorted((SOURCE / room).rglob("*.py"))):
        place = path.relative_to(SOURCE).as_posix()
        if place in NOT_IN_A_MOVE:
            continue
        for function in ast.walk(parsed(path)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from ((place, name) for name in imported_in(function))


def parsed(path: Path) -> ast.Module:
    """Without garbage collection: Python before 3.11.5 fails if it runs a finaliser that parses, as one does that tells of an
    error nobody retrieved. Source: https://github.com/python/cpython/issues/106905."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def imported_in(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield node.module


def test_what_is_imported_late_is_loaded_before_a_session_is_opened() -> None:
    loaded = set(said("from sandshift.shim.late import load_rest\nload_rest()\nprint(*sys.modules)").split())
    late = set(late_imports())
    assert ("shim/migration/desk.py", "sandshift.shim.migration.opening") in late
    assert {(place, name) for place, name in late if name not in loaded} - NEVER_IN_A_MOVE == set()


def test_the_collector_does_not_look_at_what_was_loaded_late() -> None:
    code = """
import gc
import sandshift.shim.serve
sandshift.shim.serve.settle()
before = gc.get_freeze_count()
from sandshift.shim.late import load_rest
load_rest()
once = gc.get_freeze_count()
load_rest()
print(gc.isenabled(), once - before > 10_000, gc.get_freeze_count() - once <= 0, len(gc.get_objects()) < 1_000)
"""
    assert said(code) == "True True True True"


async def test_a_session_is_opened_with_everything_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(desk, "load_rest", lambda: told.append("loaded"))
    async with two_hosts(tmp_path) as hosts:
        assert told == []
        await hosts.prepare()
        assert told == ["loaded", "loaded"]  # By either side, with the session's first call.
