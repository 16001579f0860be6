"""`start`: bind the socket, fork the serving process, answer the address.

Only the child imports asyncio, protobuf and all else that takes time; what is imported here is already in a bare
interpreter, so that `start` answers in some 15 ms. containerd reads stdout and stderr together until both are closed:
nothing else is ever printed there, and the child lets go of both before anything else. Source: reference facts on
containerd's shim bootstrap (docs/reference/shim.md).
"""

from __future__ import annotations

import _socket
import errno
import os
import sys

from sandshift.shim.by_hand import protobuf_strings
from sandshift.shim.ground import Ground, containerd_is_two
from sandshift.shim.grouping import pod_of_bundle
from sandshift.shim.identity import started_ticks_of
from sandshift.shim.own_socket import lock_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sandshift.shim.arguments import Arguments

STDIN_BYTES_MAX = 10 << 20
LISTEN_BACKLOG = 128
ALIVE_TIMEOUT_S = 2.0


def came_as_bootstrap_params(stdin: bytes, arguments: Arguments) -> bool:
    """containerd 2.3 and newer sends BootstrapParams, older ones an Any of options; both parse as each other.

    Told apart as containerd itself does: by the id and namespace that BootstrapParams repeats.
    """
    fields = protobuf_strings(stdin)
    return fields.get(1) == arguments.id.encode() and fields.get(2) == arguments.namespace.encode()


def answer_of_start(
    address: str,
    *,
    stdin: bytes,
    arguments: Arguments,
    environment: Mapping[str, str],
    ground: Ground | None = None,
) -> bytes:
    """What `start` prints: a plain address for containerd 1.6, else JSON with the newest version it takes.

    1.7 takes no version 3, 2.0 and newer do, and their environment is the same: only the binary itself tells them apart
    before 2.3. Without `ground` it is not asked.
    """
    if "MAX_SHIM_VERSION" not in environment:
        return address.encode()
    told = environment.get("SANDSHIFT_SHIM_VERSION", "")
    takes_three = came_as_bootstrap_params(stdin, arguments) or told == "3"
    if not takes_three and not told and ground is not None:
        takes_three = containerd_is_two(arguments.publish_binary, ground.memo_dir)
    quoted = address.replace("\\", "\\\\").replace('"', '\\"')
    return f'{{"version": {3 if takes_three else 2}, "address": "{quoted}", "protocol": "ttrpc"}}'.encode()


def _somebody_answers(path: str) -> bool:
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.settimeout(ALIVE_TIMEOUT_S)
        probe.connect(path)
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    finally:
        probe.close()
    return True


def bind(place: str | os.PathLike[str]) -> _socket.socket | None:
    """Listen at `place`, 0600 in a 0700 folder; None if a living shim listens there already.

    Raises Unavailable if the place cannot be used, with what to do.
    """
    path = os.fspath(place)
    folder, _, name = path.rpartition("/")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)  # noqa: PTH103
        # A socket that is bound and does not listen yet looks like a dead shim's: another `start` must not meet it.
        lock = lock_of(folder, name)
        try:
            return _bind(path)
        finally:
            os.close(lock)
    except OSError as error:
        from sandshift.errors import Unavailable  # noqa: PLC0415 - loaded only where it is needed

        raise Unavailable(
            f"the shim cannot listen at {path}: {error.strerror}; run as root, or set places.run_dir to a folder of your own"
        ) from error


def _bind(path: str) -> _socket.socket | None:
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if _somebody_answers(path):
                listener.close()
                return None
            os.unlink(path)  # noqa: PTH108
            listener.bind(path)
        os.chmod(path, 0o600)  # noqa: PTH101
        listener.listen(LISTEN_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def write_pid_file(place: str | os.PathLike[str], pid: int) -> None:
    """Which process serves: known before `start` answers, so that a `delete` right after it finds whom to end."""
    path = os.fspath(place)
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.start"
    _write(temporary, f'{{"pid": {pid}, "started_ticks": {started_ticks_of(pid)}}}')
    os.replace(temporary, path)  # noqa: PTH105


def _read(path: str) -> str:
    """Empty: it is not there, or cannot be read."""
    try:
        with open(path) as file:  # noqa: PTH123
            return file.read()
    except (OSError, ValueError):
        return ""


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123
        file.write(text)


def _enter_network_namespace(name: str) -> None:
    """Move this process into the host's network namespace, if the configuration names one."""
    if not name:
        return
    from sandshift.errors import Rejected, SandshiftError  # noqa: PLC0415 - only hosts that are namespaces pay for it
    from sandshift.network_namespace import enter_file  # noqa: PLC0415

    try:
        enter_file(f"/run/netns/{name}")
    except SandshiftError as error:
        raise Rejected(f"host.network_namespace: {error.message}; make it with ip netns add") from error


def _detach(log_path: str) -> None:
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


def start(arguments: Arguments, ground: Ground) -> bytes:
    """Start the shim of sandbox `arguments.id`, or find the one that lives. Returns what to print."""
    stdin = b"" if arguments.headless else _read_stdin()
    pod = "" if arguments.headless else pod_of_bundle("config.json")
    if pod:
        from sandshift.identifiers import identifier  # noqa: PLC0415 - only containers of pods pay for it

        identifier("annotation io.kubernetes.cri.sandbox-id", pod)
    path = ground.shim_socket(arguments.namespace, pod or arguments.id)
    address = f"unix://{path}"
    answer = answer_of_start(address, stdin=stdin, arguments=arguments, environment=os.environ, ground=ground)
    if pod and pod != arguments.id:
        _require_pod(pod, path)
        _try(lambda: _write("address", address))
        return answer
    listener = bind(path)
    if listener is not None:
        run_dir = ground.sandbox_run_dir(arguments.namespace, arguments.id)
        os.makedirs(run_dir, mode=0o700, exist_ok=True)  # noqa: PTH103
        _enter_network_namespace(ground.network_namespace)
        before = _read(f"{run_dir}/shim.pid")
        if (child := os.fork()) == 0:
            _serve(arguments, listener, run_dir, before)
        listener.close()
        _try(
            lambda: write_pid_file(f"{run_dir}/shim.pid", child)
        )  # The child writes it too, and says what is wrong.
    if os.path.exists("config.json"):  # noqa: PTH110
        _try(lambda: _write("address", address))
    return answer


def _require_pod(pod: str, path: str) -> None:
    """Raises Unavailable: a container of a pod has no shim but the pod's."""
    if not _somebody_answers(path):
        from sandshift.errors import Unavailable  # noqa: PLC0415 - loaded only where it is needed
        from sandshift.identifiers import shown  # noqa: PLC0415

        raise Unavailable(
            f"the shim of pod {shown(pod)} does not answer at {path}: start the pod's sandbox container first"
        )


def _try(write: Callable[[], None]) -> None:
    try:
        write()
    except OSError:
        return


def _read_stdin() -> bytes:
    """What containerd gives at most; nothing from a terminal."""
    found = b""
    try:
        if os.isatty(0):
            return b""
        while len(found) < STDIN_BYTES_MAX and (piece := os.read(0, 1 << 16)):
            found += piece
    except OSError:
        return found
    return found


def _serve(arguments: Arguments, listener: _socket.socket, run_dir: str, before: str) -> None:
    """The child: never returns. `before`: the pid file of the shim before it."""
    code = 1
    try:
        # Before anything is loaded: our caller reads until we have let go of its pipes.
        _detach(f"{run_dir}/shim.log")
        _leave_no_core()
        import gc  # noqa: PLC0415 - only the child pays for it

        gc.disable()  # Until everything is loaded: serve.py, settle().
        from sandshift.shim.lightly import load_lightly  # noqa: PLC0415

        load_lightly()
        from sandshift.shim.serve import serve_from_start  # noqa: PLC0415 - only the child pays for it

        if before:
            from sandshift.shim.predecessor import wait_for_end  # noqa: PLC0415 - most shims have none

            wait_for_end(before)
        serve_from_start(arguments, listener.detach())
        code = 0
    except BaseException:  # noqa: BLE001 - the last line of a process: written down, whatever it is
        import traceback  # noqa: PLC0415

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
