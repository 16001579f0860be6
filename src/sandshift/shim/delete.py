"""`delete`: containerd calls it whenever its connection to a shim has ended, cleanly or not.

Without a session it kills the VM, as containerd expects. With a session open, or a handover unfinished, it kills
nothing: it brings the shim back on its state directory and lets the session go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

from sandshift.config import Config
from sandshift.shim.arguments import Arguments
from sandshift.shim.by_hand import length_delimited, varint
from sandshift.shim.ground import Ground
from sandshift.shim.identity import started_ticks_of
from sandshift.shim.places import Places
from sandshift.shim.start import start

EXIT_BY_SIGKILL: Final = 137
WAIT_FOR_END_S: Final = 3.0


def delete(arguments: Arguments, config: Config) -> bytes:
    """Returns the DeleteResponse to print."""
    places = Places.of(config, arguments.namespace, arguments.id)
    if places.unfinished_session():
        start(
            Arguments(action="start", namespace=arguments.namespace, id=arguments.id, headless=True),
            Ground.of(config),
        )
        return delete_response(exit_status=EXIT_BY_SIGKILL, now_ns=time.time_ns())
    for pid_file in (places.shim_pid_file, places.vm_dir / "vm.pid"):
        kill_by_pid_file(pid_file)
    ip = _ip(places.recorded_network_namespace(), config.host.network_namespace)
    for tap in places.recorded_taps():
        subprocess.run([*ip, "link", "delete", "dev", tap], check=False, stderr=subprocess.DEVNULL)
    shutil.rmtree(places.run_dir, ignore_errors=True)
    shutil.rmtree(places.state_dir, ignore_errors=True)
    with contextlib.suppress(OSError):
        config.shim_socket(arguments.namespace, arguments.id).unlink()
    return delete_response(exit_status=EXIT_BY_SIGKILL, now_ns=time.time_ns())


def _ip(pod_namespace: str, host_namespace: str) -> list[str]:
    """`ip` where the taps are: in the pod's network namespace (a path), in the host's (a name), or here."""
    if pod_namespace:
        return ["nsenter", f"--net={pod_namespace}", "ip"]
    return ["ip", "-n", host_namespace] if host_namespace else ["ip"]


def kill_by_pid_file(pid_file: Path) -> None:
    """SIGKILL the process that `pid_file` names, if that very process still lives.

    The file is JSON with "pid" and "started_ticks", as the shim and the VM's driver write it.
    """
    try:
        record = json.loads(pid_file.read_text())
        pid, started_ticks = int(record["pid"]), int(record["started_ticks"])
        process = os.pidfd_open(pid)
    except (OSError, ValueError, KeyError, TypeError):
        return
    try:
        if started_ticks_of(pid) != started_ticks:
            return
        signal.pidfd_send_signal(process, signal.SIGKILL)
        _wait_for_end(process)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)


def _wait_for_end(process: int) -> None:
    import select  # noqa: PLC0415 - delete is timed by containerd; what is not needed is not loaded

    select.select([process], [], [], WAIT_FOR_END_S)


def delete_response(*, exit_status: int, now_ns: int) -> bytes:
    """containerd.task.v2.DeleteResponse, written by hand so that this path needs no protobuf: pid=1 exit_status=2 exited_at=3."""
    seconds, nanos = divmod(now_ns, 1_000_000_000)
    stamp = b"\x08" + varint(seconds) + b"\x10" + varint(nanos)
    return b"\x10" + varint(exit_status) + length_delimited(3, stamp)
