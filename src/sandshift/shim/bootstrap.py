"""containerd-shim-sandshift-v2: how containerd (or the node, or a person) starts, deletes and asks a shim.

`start` binds the socket, forks the serving process and prints the address; only the child imports asyncio and
protobuf, so that `start` answers in a few milliseconds. containerd reads stdout and stderr together until both are
closed: nothing else is ever printed there, and the child lets go of both before anything else.

Source: reference facts on containerd's shim bootstrap (docs/reference/shim.md).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.config import Config, load
from sandshift.errors import Rejected, SandshiftError, Unavailable
from sandshift.session.ids import sandbox_id as checked_sandbox_id

STDIN_BYTES_MAX: Final = 10 << 20
LISTEN_BACKLOG: Final = 128
ALIVE_TIMEOUT_S: Final = 2.0
FLAGS_WITH_VALUE: Final = frozenset({"namespace", "address", "publish-binary", "id", "bundle", "socket"})
FLAGS_WITHOUT_VALUE: Final = frozenset({"debug", "info", "v", "version", "headless"})
ACTIONS: Final = frozenset({"start", "delete"})


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line, in Go's flag syntax: one dash or two, "-flag value" or "-flag=value", the action last."""

    action: str = ""
    namespace: str = "default"
    id: str = ""
    address: str = ""
    publish_binary: str = ""
    bundle: str = ""
    debug: bool = False
    info: bool = False
    version: bool = False
    headless: bool = False
    """Nobody asked for this start: a shim that `delete` brings back to finish a session."""


def parse_arguments(argv: list[str]) -> Arguments:
    """Raises Rejected, naming the word that is not understood."""
    values: dict[str, str | bool] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            if word not in ACTIONS or "action" in values:
                raise Rejected(
                    f"{word!r} is not an action of this shim: use one of {', '.join(sorted(ACTIONS))}"
                )
            values["action"] = word
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        if name in FLAGS_WITHOUT_VALUE:
            values["version" if name == "v" else name] = True
        elif name in FLAGS_WITH_VALUE:
            values[name.replace("-", "_")] = value if has_value else next(words, "")
        else:
            raise Rejected(f"{word!r} is not a flag of this shim")
    values.pop("socket", None)
    return Arguments(**values)  # type: ignore[arg-type]


def _protobuf_strings(data: bytes) -> dict[int, bytes]:
    """The length-delimited top-level fields of a protobuf message, first of each; empty if it is not one."""
    fields: dict[int, bytes] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    try:
        while at < len(data):
            key = varint()
            match key & 7:
                case 0:
                    varint()
                case 1:
                    at += 8
                case 2:
                    size = varint()
                    if at + size > len(data):
                        return {}
                    fields.setdefault(key >> 3, data[at : at + size])
                    at += size
                case 5:
                    at += 4
                case _:
                    return {}
    except IndexError:
        return {}
    return fields


def came_as_bootstrap_params(stdin: bytes, arguments: Arguments) -> bool:
    """containerd 2.3 and newer sends BootstrapParams, older ones an Any of options; both parse as each other.

    Told apart as containerd itself does: by the id and namespace that BootstrapParams repeats.
    """
    fields = _protobuf_strings(stdin)
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
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        for _attempt in range(2):
            try:
                listener.bind(str(path))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                if _somebody_answers(path):
                    listener.close()
                    return None
                path.unlink(missing_ok=True)
        path.chmod(0o600)
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        raise Unavailable(
            f"the shim cannot listen at {path}: {error.strerror}; run as root, or set places.run_dir to a folder of your own"
        ) from error
    return listener


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
        if os.fork() == 0:
            _serve(arguments, config, listener, run_dir)
        listener.close()
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
        from sandshift.shim.serve import serve  # noqa: PLC0415 - only the child pays for asyncio and protobuf

        serve(arguments, config, listener)
        code = 0
    except BaseException:  # noqa: BLE001 - the last line of a process: written down, whatever it is
        import traceback  # noqa: PLC0415

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    try:
        arguments = parse_arguments(sys.argv[1:])
        if arguments.version:
            from sandshift import VERSION  # noqa: PLC0415

            output = f"containerd-shim-sandshift-v2:\n  Version:  {VERSION}\n".encode()
        elif arguments.info:
            from sandshift.shim.info import runtime_info  # noqa: PLC0415

            output = runtime_info()
        else:
            config = load()
            checked_sandbox_id(arguments.id)
            if arguments.action == "start":
                output = start(arguments, config)
            elif arguments.action == "delete":
                from sandshift.shim.delete import delete  # noqa: PLC0415

                output = delete(arguments, config)
            else:
                raise Rejected(
                    "no action given: use start or delete, as containerd does; people use the sandshift command"
                )
    except SandshiftError as error:
        sys.stderr.write(f"containerd-shim-sandshift-v2: {error.message}\n")
        raise SystemExit(1) from error
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
