"""What the documents show must work: their examples are run."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from sandshift.session import descriptor
from sandshift.shim import handed_socket
from sandshift.wire.migration import messages_pb2

DOCS = Path(__file__).resolve().parent.parent / "docs"


def python_block(page: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"{page} has {len(blocks)} Python examples"
    return str(blocks[0])


def test_the_socket_descriptor_of_the_page_is_taken_by_the_shim() -> None:
    names: dict[str, object] = {"messages_pb2": messages_pb2}
    exec(python_block("reference/socket-descriptor.md"), names)
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
