"""What one shim costs: how soon `start` answers, how soon the first call is answered, and what memory it takes.

    ./run bench shim --json

The shim is run as containerd runs it: the launcher, BootstrapParams-less, its standard streams pipes that are read to
their end. The first call is Task.Connect's peer of a pod, SandboxStatus, on a connection made as soon as `start` has
answered; it is answered by the whole shim, with every service registered. Memory is that of a shim that has answered: RSS
alone (median), and PSS of 30 that run at once (mean), as the kernel counts them. A shim loads most of its code with its
sandbox, so one with a running VM is looked at as well, without a bound, where root has a guest image. Peers in the same run:
the distribution's containerd-shim-runc-v2 where ./run has fetched it, and a bare interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from sandshift.config import Places
from sandshift.shim import launcher
from sandshift.shim.late import REST_AFTER_S
from sandshift.wire.containerd import sandbox_pb2
from ttrpc.wire import ttrpc_pb2

ROOT: Final = Path(__file__).resolve().parent.parent
CONTAINERD: Final = ROOT / ".cache" / "containerd" / "new" / "usr" / "bin"
STARTS: Final = 15
TOGETHER: Final = 30
END_S: Final = 10.0
LOADED_S: Final = REST_AFTER_S + 2.0
"""After the VM runs: then the shim has loaded whatever it may need."""
NAMESPACE: Final = "bench"
REQUEST, RESPONSE = 1, 2
SERVICE: Final = "containerd.runtime.sandbox.v1.Sandbox"
HEADER: Final = struct.Struct(">IIBB")

M = TypeVar("M", bound=Message)


@dataclass
class Shims:
    """Shims in a folder of their own; all ended with `close`."""

    folder: Path
    program: Path
    pids: list[int] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "SANDSHIFT_CONFIG": str(self.folder / "config.toml"),
            "MAX_SHIM_VERSION": "2",
            "SANDSHIFT_SHIM_VERSION": "3",
        }

    def start(self, name: str) -> tuple[float, float]:
        """Milliseconds from the start of `start` to its end, and to the first answer."""
        bundle = self.folder / "bundles" / name
        bundle.mkdir(parents=True)
        began_s = time.perf_counter()
        ran = subprocess.run(
            [self.program, "-namespace", NAMESPACE, "-address", "", "-id", name, "start"],
            input=b"",
            cwd=bundle,
            env=self.environment,
            capture_output=True,
            check=True,
        )
        start_ms = (time.perf_counter() - began_s) * 1e3
        assert ran.stderr == b"", ran
        path = json.loads(ran.stdout)["address"].removeprefix("unix://")
        ask(path, name)
        first_ms = (time.perf_counter() - began_s) * 1e3
        record = json.loads((self.folder / "run" / NAMESPACE / name / "shim.pid").read_text())
        self.pids.append(record["pid"])
        return start_ms, first_ms

    def close(self) -> None:
        handles = []
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGTERM)
        deadline_s = time.monotonic() + END_S
        for handle in handles:
            wait_for_end(handle, deadline_s)
            os.close(handle)
        self.pids.clear()


def wait_for_end(process: int, deadline_s: float) -> None:
    if not select.select([process], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
        signal.pidfd_send_signal(process, signal.SIGKILL)


def ask(path: str, sandbox_id: str) -> None:
    """The first call, and that its answer is the one."""
    request = sandbox_pb2.SandboxStatusRequest(sandbox_id=sandbox_id)
    status = call(path, "SandboxStatus", request, sandbox_pb2.SandboxStatusResponse)
    assert status.sandbox_id == sandbox_id, status


def call(path: str, method: str, request: Message, response_type: type[M]) -> M:
    """One unary call, by hand: the client's own start-up is not what is measured."""
    data = ttrpc_pb2.Request(
        service=SERVICE, method=method, payload=request.SerializeToString()
    ).SerializeToString()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(HEADER.pack(len(data), 1, REQUEST, 0) + data)
        size, _, kind, _ = HEADER.unpack(_exactly(connection, HEADER.size))
        response = ttrpc_pb2.Response.FromString(_exactly(connection, size))
    assert kind == RESPONSE, kind
    assert response.status.code == 0, response.status
    return response_type.FromString(response.payload)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        assert piece, "the shim hung up"
        data += piece
    return data


def memory_kib(pid: int) -> dict[str, int]:
    """Rss, Pss and others of a process. Source: /proc/PID/smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


@contextlib.contextmanager
def shims(cache: str = "") -> Iterator[Shims]:
    """`cache`: the folder with the guest image; empty: an empty one."""
    with tempfile.TemporaryDirectory(prefix="sandshift-bench-") as made:
        folder = Path(made)
        (folder / "config.toml").write_text(
            f'[places]\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\n'
            f'cache_dir = "{cache or folder / "cache"}"\n[vm]\naccelerator = "tcg"\n'
        )
        found = Shims(folder, launcher.install(folder))
        try:
            yield found
        finally:
            found.close()


def measure() -> dict[str, Any]:
    with shims() as made:
        made.start("warm")  # The first start notes what the configuration says; every later one finds it.
        times = [made.start(f"one{number}") for number in range(STARTS)]
        rss_kib = statistics.median(memory_kib(pid)["Rss"] for pid in made.pids)
        made.close()
        for number in range(TOGETHER):
            made.start(f"many{number}")
        pss_kib = statistics.fmean(memory_kib(pid)["Pss"] for pid in made.pids)
    return {
        "start_ms": round(statistics.median(start_ms for start_ms, _ in times), 1),
        "first_rpc_ms": round(statistics.median(first_ms for _, first_ms in times), 1),
        "rss_mb": round(rss_kib / 1024, 1),
        "pss_mb_at_30": round(pss_kib / 1024, 1),
        "with_vm": with_vm(),
        "start_ms_worst": round(max(start_ms for start_ms, _ in times), 1),
        "first_rpc_ms_worst": round(max(first_ms for _, first_ms in times), 1),
        "peers": {"python_ms": python_ms(), "runc_info_ms": runc_info_ms()},
        "bounds": {"start_ms": 25, "first_rpc_ms": 100, "rss_mb": 25, "pss_mb_at_30": 15},
    }


def with_vm() -> dict[str, float] | None:
    """Memory of one shim whose VM runs, in MB; None: not root, or no guest image is built (./run image)."""
    cache = Path(Places().cache_dir)
    if os.geteuid() != 0 or not any((cache / "images").glob("*")):
        return None
    with shims(str(cache)) as made:
        made.start("vm")
        path = str(made.folder / "run" / NAMESPACE / "vm" / "shim.sock")
        create = sandbox_pb2.CreateSandboxRequest(sandbox_id="vm")
        call(path, "CreateSandbox", create, sandbox_pb2.CreateSandboxResponse)
        start = sandbox_pb2.StartSandboxRequest(sandbox_id="vm")
        call(path, "StartSandbox", start, sandbox_pb2.StartSandboxResponse)
        try:
            time.sleep(LOADED_S)
            found = memory_kib(made.pids[-1])
        finally:
            stop = sandbox_pb2.ShutdownSandboxRequest(sandbox_id="vm")
            call(path, "ShutdownSandbox", stop, sandbox_pb2.ShutdownSandboxResponse)
    return {"rss_mb": round(found["Rss"] / 1024, 1), "pss_mb": round(found["Pss"] / 1024, 1)}


def median_ms(command: list[str]) -> float:
    found = []
    for _ in range(STARTS):
        began_s = time.perf_counter()
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        found.append((time.perf_counter() - began_s) * 1e3)
    return round(statistics.median(found), 1)


def python_ms() -> float:
    """A bare interpreter that does nothing, isolated as our launcher is: what no shim in Python goes below."""
    return median_ms([launcher.interpreter(), "-IS", "-c", "pass"])


def runc_info_ms() -> float | None:
    """The stock shim's -info, a program in Go; None: ./run setup containerd has not fetched it."""
    program = CONTAINERD / "containerd-shim-runc-v2"
    return median_ms([str(program), "-v"]) if program.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    arguments = parser.parse_args()
    found = measure()
    if arguments.json:
        print(json.dumps(found))
        return
    bounds = found["bounds"]
    for name, bound in bounds.items():
        print(f"{name:>14} {found[name]:>7} (bound {bound})")
    print(f"       with_vm {found['with_vm']}", file=sys.stderr)
    print(f"         peers {found['peers']}", file=sys.stderr)


if __name__ == "__main__":
    main()
