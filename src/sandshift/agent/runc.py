"""Running runc: one call, waited for without blocking, its complaint made one line and a code."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sandshift.agent.table import Table
from ttrpc import Code, StatusError

STATE: Final = Path("/run/runc")
"""runc's own folder, one folder per container below it."""
ANSWERS_S: Final = 60.0
"""How long one call may take on a busy host."""
_ENVIRONMENT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_LOG_BYTES: Final = 64 << 10
_PREAMBLES: Final = re.compile(
    r"^(?:(?:runc )?\w+ failed: |(?:runc did not terminate successfully: )?exit status \d+: |"
    r"unable to start container process: |error during container init: |OCI runtime \w+ failed: )+"
)
_CODES: Final = (
    (
        r"executable file not found|exec: .*no such file or directory|chdir to cwd .*no such file",
        Code.NOT_FOUND,
    ),
    (r"container does not exist|no such container", Code.NOT_FOUND),
    (r"(stopped|paused|not running|has stopped|cannot exec)", Code.FAILED_PRECONDITION),
    (
        r"no space left|cannot allocate memory|too many open files|resource temporarily",
        Code.RESOURCE_EXHAUSTED,
    ),
    (r"container with (?:given )?(?:id|ID) .*exist", Code.ALREADY_EXISTS),
    (r"exec: .*permission denied|is a directory", Code.PERMISSION_DENIED),
)
"""What runc says -> what the caller can do. Everything else is something in the spec that it or the kernel does not take."""


class Run:
    """One call of runc."""

    def __init__(self, args: Sequence[str], stdio: tuple[int, int, int]) -> None:
        """Raises OSError: it cannot be started."""
        self._popen = subprocess.Popen(
            ["runc", *args],
            stdin=stdio[0],
            stdout=stdio[1],
            stderr=stdio[2],
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        self.pid = self._popen.pid
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._pidfd = os.pidfd_open(self.pid)
        loop.add_reader(self._pidfd, self.reap)

    def reap(self) -> None:
        if self._pidfd < 0 or (status := self._popen.poll()) is None:
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._ended.set_result(status)

    async def wait(self) -> int:
        """Its status. One that takes longer than ANSWERS_S is killed."""
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._ended), ANSWERS_S)
        os.killpg(self.pid, signal.SIGKILL)
        return await self._ended


async def run(
    table: Table,
    subject: str,
    args: Sequence[str],
    *,
    log: Path,
    stdio: tuple[int, int, int] = (subprocess.DEVNULL,) * 3,
) -> None:
    """Call runc and wait for its end.

    Args:
        subject: of the complaint: "container c cannot be made".
        log: where runc may write its own; removed in the end.

    Raises:
        StatusError: it failed: one line that begins with `subject`.
    """
    try:
        called = Run(["--log", str(log), "--log-format", "json", *args], stdio)
        with table.tool(called):
            status = await called.wait()
        if status != 0:
            raise explained(subject, _read(log), status)
    except OSError as error:
        raise StatusError(Code.INTERNAL, f"{subject}: runc cannot be run: {error.strerror}") from error
    finally:
        _remove(log)


def explained(subject: str, log: str, status: int) -> StatusError:
    """The complaint of a call that failed, from its log. Pure."""
    complaints = [said for line in log.splitlines() if (said := _complaint(line))]
    if not complaints:
        ended = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
        return StatusError(Code.INTERNAL, f"{subject}: runc {ended} and gave no reason")
    said = _PREAMBLES.sub("", " ".join(complaints[-1].split()))
    code = next((code for words, code in _CODES if re.search(words, said)), Code.INVALID_ARGUMENT)
    return StatusError(code, f"{subject}: {said}")


def _complaint(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return ""
    is_error = isinstance(entry, dict) and entry.get("level") in ("error", "fatal")
    return str(entry.get("msg", "")) if is_error else ""


def _read(log: Path) -> str:
    try:
        return log.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
    except OSError:
        return ""


def _remove(log: Path) -> None:
    log.unlink(missing_ok=True)
