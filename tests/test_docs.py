"""What the documents show must work: their examples are run."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from sandshift.session import descriptor
from sandshift.shim import handed_socket
from sandshift.wire.migration import messages_pb2

ROOT = Path(__file__).resolve().parent.parent


def block(page: str, language: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"{page} has {len(blocks)} examples of {language}"
    return str(blocks[0])


def test_the_socket_descriptor_of_the_page_is_taken_by_the_shim() -> None:
    names: dict[str, object] = {"messages_pb2": messages_pb2}
    exec(block("docs/reference/socket-descriptor.md", "python"), names)
    near, far = socket.socketpair()
    with near, far:
        said = names["describe"](near)
        asked = descriptor.parse(said, caller_pid=os.getpid(), caller_uid=os.getuid())
        copy = handed_socket.copy_descriptor(asked.pid, asked.fd)
        try:
            facts = handed_socket.facts_of(copy)
        finally:
            os.close(copy)
    assert asked == descriptor.Descriptor(
        pid=os.getpid(),
        fd=asked.fd,
        cookie=facts.cookie,
        family=socket.AF_UNIX,
        type=socket.SOCK_STREAM,
        protocol=0,
    )
    assert facts.connected


def test_the_ttrpc_example_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "greeter.proto").write_text(block("README.md", "proto"))
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(
        ["protoc", "--python_out=.", "--ttrpc-python_out=.", "greeter.proto"],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=60,
    )
    example = block("README.md", "python").replace("/run/greeter.sock", str(tmp_path / "greeter.sock"))
    ran = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("hello you\n", "", 0)
