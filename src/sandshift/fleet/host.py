"""A host as the coordinator sees it: a configuration file, and the shims that run by it.

Shims are started, started again after a crash, and removed only through their own program, as containerd does it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.config import DEFAULT_PATH, PATH_VARIABLE, Config, load
from sandshift.errors import NotSupported, PeerProtocolError, Rejected, TimedOut, Unavailable

SHIM_PROGRAM: Final = "containerd-shim-sandshift-v2"
SHIM_START_S: Final = 10.0
"""How long `start` may take to print its address. It forks and answers in milliseconds; a busy machine takes longer."""
SHIM_DELETE_S: Final = 30.0
"""How long `delete` may take: it ends the VM."""
DEFAULT_MIGRATION_ADDRESS: Final = "127.0.0.1"
NAMESPACE_DEFAULT: Final = "default"
_CONTAINERD_VARIABLES: Final = ("MAX_SHIM_VERSION", "TTRPC_ADDRESS", "GRPC_ADDRESS", "NAMESPACE")
"""What containerd tells its shims; not to be inherited from a shell that has them by chance."""


@dataclass(frozen=True, slots=True)
class Host:
    """One host. Two of them on one machine differ in their places and their network namespace."""

    config: Config
    config_path: Path | None = None
    """What this host's shims read; None: /etc/sandshift/config.toml, or the defaults if that is not there."""

    @classmethod
    def load(cls, path: Path | None = None) -> Host:
        """The host of `path`; None: of $SANDSHIFT_CONFIG, else of this machine's own configuration.

        Raises:
            Rejected: the file cannot be read or holds something wrong; names file and key.
        """
        config = load(path)
        if path is None and os.environ.get(PATH_VARIABLE):
            path = Path(os.environ[PATH_VARIABLE])
        if path is None and DEFAULT_PATH.exists():
            path = DEFAULT_PATH
        return cls(config, path.absolute() if path else None)

    @property
    def name(self) -> str:
        return self.config.host_name

    @property
    def migration_address(self) -> str:
        return self.config.host.migration_address or DEFAULT_MIGRATION_ADDRESS

    @property
    def environment(self) -> dict[str, str]:
        """What a process of this host is started with."""
        inherited = {name: value for name, value in os.environ.items() if name not in _CONTAINERD_VARIABLES}
        inherited.pop(PATH_VARIABLE, None)
        return {**inherited, PATH_VARIABLE: str(self.config_path)} if self.config_path else inherited

    def is_same_place_as(self, other: Host) -> bool:
        """Whether a sandbox of one id could not be on both: its sockets or its state would be the same files."""
        mine, others = self.config.places, other.config.places
        return mine.run_dir == others.run_dir or mine.state_dir == others.state_dir

    def sandboxes(self) -> list[tuple[str, str]]:
        """(namespace, id) of every sandbox that has a place under run_dir, sorted.

        Raises:
            PermissionError: this user may not look there.
        """
        run_dir = Path(self.config.places.run_dir)
        if not run_dir.is_dir():
            return []
        return sorted(
            (namespace.name, folder.name)
            for namespace in run_dir.iterdir()  # not glob, which finds nothing where it may not look
            if namespace.is_dir()
            for folder in namespace.iterdir()
            if folder.is_dir() and self.has_shim(namespace.name, folder.name)
        )

    def has_shim(self, namespace: str, sandbox_id: str) -> bool:
        """Whether a shim listens there, or once did; also where this user may not look."""
        try:
            return self.config.shim_socket(namespace, sandbox_id).is_socket()
        except PermissionError:
            return True


async def start_shim(host: Host, namespace: str, sandbox_id: str) -> str:
    """Start the shim of this sandbox on `host`, or find the one that lives; answers the address of its socket.

    A shim that died is brought back on its state directory this way: it finds its VM and its session.

    Raises:
        Rejected: the shim refuses to start, with its own words. TimedOut: it says nothing. NotSupported: it is not
        installed.
    """
    printed = await _run_shim_program(
        host, "start", namespace, sandbox_id, bound_s=SHIM_START_S, cwd=Path("/")
    )
    return parse_address(printed)


async def delete_shim(host: Host, namespace: str, sandbox_id: str) -> None:
    """Remove what a shim that does not answer has left: its VM, taps, files. One with an open session is brought back.

    Raises as `start_shim` does.
    """
    await _run_shim_program(host, "delete", namespace, sandbox_id, bound_s=SHIM_DELETE_S, cwd=Path("/"))


def parse_address(printed: bytes) -> str:
    """The socket's address from what `start` printed: plain, or containerd's JSON.

    Raises:
        PeerProtocolError: it is neither.
    """
    text = printed.decode(errors="replace").strip()
    address = text
    if text.startswith("{"):
        try:
            address = json.loads(text)["address"]
        except (ValueError, KeyError) as error:
            raise PeerProtocolError(
                f"{SHIM_PROGRAM} start printed {text[:200]!r}, which is no address"
            ) from error
    if not isinstance(address, str) or not address.startswith("unix://"):
        raise PeerProtocolError(f"{SHIM_PROGRAM} start printed {text[:200]!r}, which is no address")
    return address


def shim_program() -> str:
    """The shim's program: beside the Python that runs us, else on PATH.

    Raises:
        NotSupported: it is in neither place.
    """
    beside = Path(sys.executable).parent / SHIM_PROGRAM
    if beside.exists():
        return str(beside)
    if found := shutil.which(SHIM_PROGRAM):
        return found
    raise NotSupported(
        f"{SHIM_PROGRAM} is neither beside {sys.executable} nor on PATH: install sandshift there"
    )


async def _run_shim_program(
    host: Host, action: str, namespace: str, sandbox_id: str, *, bound_s: float, cwd: Path
) -> bytes:
    arguments = [shim_program(), "-namespace", namespace, "-id", sandbox_id, "-address", "", action]
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=cwd,
            env=host.environment,
            start_new_session=True,  # Ctrl-C at a terminal is for the command, which winds back in order
        )
    except OSError as error:
        raise Unavailable(f"{arguments[0]} cannot be run: {error.strerror}") from error
    try:
        stdout, stderr = await _to_its_end(process, bound_s)
    except TimeoutError as error:
        raise TimedOut(
            f"{SHIM_PROGRAM} {action} of sandbox {sandbox_id} on host {host.name} said nothing for {bound_s:g} s;"
            f" look at {host.config.sandbox_run_dir(namespace, sandbox_id) / 'shim.log'}"
        ) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = stderr.decode(errors="replace").strip().removeprefix(f"{SHIM_PROGRAM}: ")
        raise Rejected(
            f"host {host.name}: {said or f'{SHIM_PROGRAM} {action} ended with {process.returncode}'}"
        )
    return stdout


async def _to_its_end(process: asyncio.subprocess.Process, bound_s: float) -> tuple[bytes, bytes]:
    """What a program printed. A caller who is cancelled waits for its end first: `start` that is killed between its
    fork and its answer leaves a shim that nobody knows of.

    Raises:
        TimeoutError: it does not end within `bound_s`.
    """
    printed = asyncio.ensure_future(process.communicate())
    try:
        return await asyncio.wait_for(asyncio.shield(printed), bound_s)
    except asyncio.CancelledError:
        await asyncio.wait({printed}, timeout=bound_s)
        raise
    finally:
        if not printed.done():
            printed.cancel()
