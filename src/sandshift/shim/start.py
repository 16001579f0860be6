"""`start`: bind the socket, fork the serving process, answer the address.

Only the child imports asyncio and protobuf, so that `start` answers in a few milliseconds. containerd reads stdout and
stderr together until both are closed: nothing else is ever printed there, and the child lets go of both before anything
else. Source: reference facts on containerd's shim bootstrap (docs/reference/shim.md).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandshift.errors import Rejected, Unavailable
from sandshift.shim.by_hand import protobuf_strings
from sandshift.shim.identity import started_ticks_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandshift.config import Config
    from sandshift.shim.arguments import Arguments

STDIN_BYTES_MAX: Final = 10 << 20
LISTEN_BACKLOG: Final = 128
ALIVE_TIMEOUT_S: Final = 2.0


def came_as_bootstrap_params(stdin: bytes, arguments: Arguments) -> bool:
    """containerd 2.3 and newer sends BootstrapParams, older ones an Any of options; both parse as each other.

    Told apart as containerd itself does: by the id and namespace that BootstrapParams repeats.
    """
    fields = protobuf_strings(stdin)
    return fields.get(1) == arguments.id.encode() and fields.get(2) == arguments.namespace.encode()


def answer_of_start(
    address: str, *, stdin: bytes, arguments: Arguments, environment: dict[str, str]
) -> bytes:
    """What `start` prints: a plain address for containerd 1.6, else JSON with the newest version it takes."""
    if "MAX_SHIM_VERSION" not in environment:
        return address.encode()
    version = (
        3
        if came_as_bootstrap_params(stdin, arguments) or environment.get("SANDSHIFT_SHIM_VERSION") == "3"
        else 2
    )
    return json.dumps({"version": version, "address": address, "protocol": "ttrpc"}).encode()


def _somebody_answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ALIVE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


def bind(path: Path) -> socket.socket | None:
    """Listen on `path`, 0600 in a 0700 folder; None if a living shim listens there already.

    Raises Unavailable if the place cannot be used, with what to do.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _one_at_a_time(path):
            return _bind(path)
    except OSError as error:
        raise Unavailable(
            f"the shim cannot listen at {path}: {error.strerror}; run as root, or set places.run_dir to a folder of your own"
        ) from error


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """A socket that is bound and does not listen yet looks like a dead shim's: another `start` must not meet it."""
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _bind(path: Path) -> socket.socket | None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listener.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if _somebody_answers(path):
                listener.close()
                return None
            path.unlink(missing_ok=True)
            listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(LISTEN_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def write_pid_file(path: Path, pid: int) -> None:
    """Which process serves: known before `start` answers, so that a `delete` right after it finds whom to end."""
    temporary = path.with_name(f".{path.name}.start")
    temporary.write_text(json.dumps({"pid": pid, "started_ticks": started_ticks_of(pid)}))
    temporary.replace(path)


def _enter_network_namespace(config: Config) -> None:
    """Move this process into the host's network namespace, if the configuration names one."""
    if not config.host.network_namespace:
        return
    import ctypes  # noqa: PLC0415 - only hosts that are namespaces pay for it

    path = f"/run/netns/{config.host.network_namespace}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Rejected(
            f"host.network_namespace: {path} cannot be opened ({error.strerror}); make it with ip netns add"
        ) from error
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) != 0:
            number = ctypes.get_errno()
            raise Unavailable(
                f"host.network_namespace: entering {path} failed: {os.strerror(number)}; run as root"
            )
    finally:
        os.close(descriptor)


def _detach(log_path: Path) -> None:
    """Own session; stdin, stdout and stderr away from the caller's pipes before anything else happens."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)


def _leave_no_core() -> None:
    """A core file would hold the session key, and QEMU's the guest's memory. Soft: whoever debugs may raise it again."""
    import resource  # noqa: PLC0415 - only the child pays for it

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def start(arguments: Arguments, config: Config) -> bytes:
    """Start the shim of sandbox `arguments.id`, or find the one that lives. Returns what to print."""
    stdin = b"" if sys.stdin is None or sys.stdin.isatty() or arguments.headless else _read_stdin()
    path = config.shim_socket(arguments.namespace, arguments.id)
    answer = answer_of_start(f"unix://{path}", stdin=stdin, arguments=arguments, environment=dict(os.environ))
    listener = bind(path)
    if listener is not None:
        run_dir = config.sandbox_run_dir(arguments.namespace, arguments.id)
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _enter_network_namespace(config)
        if (child := os.fork()) == 0:
            _serve(arguments, config, listener, run_dir)
        listener.close()
        with contextlib.suppress(OSError):  # The child writes it too, and says in its log what is wrong.
            write_pid_file(run_dir / "shim.pid", child)
    with contextlib.suppress(OSError):
        if Path("config.json").exists():
            Path("address").write_text(f"unix://{path}")
    return answer


def _read_stdin() -> bytes:
    return sys.stdin.buffer.read(STDIN_BYTES_MAX)


def _serve(arguments: Arguments, config: Config, listener: socket.socket, run_dir: Path) -> None:
    """The child: never returns."""
    code = 1
    try:
        _detach(run_dir / "shim.log")
        _leave_no_core()
        from sandshift.shim.serve import serve  # noqa: PLC0415 - only the child pays for asyncio and protobuf

        serve(arguments, config, listener)
        code = 0
    except BaseException:  # noqa: BLE001 - the last line of a process: written down, whatever it is
        import traceback  # noqa: PLC0415

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
