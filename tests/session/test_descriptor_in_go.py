"""The Go example of docs/reference/socket-descriptor.md, compiled and run: what it describes is what the shim finds."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sandshift.session import descriptor
from sandshift.shim.handed_socket import copy_descriptor, facts_of

PAGE = Path(__file__).parents[2] / "docs/reference/socket-descriptor.md"
MAIN = """
func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		panic(err)
	}
	info, err := Describe(conn.(*net.TCPConn))
	if err != nil {
		panic(err)
	}
	fmt.Printf("%x\\n", info)
	fmt.Scanln()
}
"""

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("go") is None, reason="optional: needs Go"),
]


def program(folder: Path) -> Path:
    example = re.search(r"```go\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    source = folder / "main.go"
    source.write_text(
        example.replace("package channel", "package main").replace('\t"os"\n', '\t"fmt"\n\t"net"\n\t"os"\n')
        + MAIN
    )
    built = folder / "describe"
    settings = {"HOME": str(folder), "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    subprocess.run(["go", "build", "-o", built, source], check=True, env={**os.environ, **settings})
    return built


def test_a_socket_described_in_go_is_the_one_that_is_found(tmp_path):
    with subprocess.Popen([program(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        info = bytes.fromhex(client.stdout.readline().decode())
        described = descriptor.parse(info, caller_pid=client.pid, caller_uid=1000)
        copy = copy_descriptor(described.pid, described.fd)
        try:
            facts = facts_of(copy)
            descriptor.check(described, facts)
        finally:
            os.close(copy)
            client.stdin.close()
    assert (facts.family, facts.type, facts.protocol, facts.connected) == (2, 1, 6, True)
