"""Asks `ip` what interfaces a network namespace has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

from sandshift.errors import NotFound, TimedOut, Unavailable
from sandshift.net.batch import IP_TIMEOUT_S, command_in
from sandshift.net.pod import SHOW_FOUR, SHOW_SIX, Interface, read_interfaces


async def look(network_namespace: str, *, taps: Iterable[str] = ()) -> tuple[Interface, ...]:
    """The interfaces of a pod's network namespace (its file's path), but for loopback and `taps`.

    Raises:
        NotFound: there is no such namespace. Unavailable, TimedOut: `ip` failed.
    """
    if not os.path.exists(network_namespace):  # noqa: ASYNC240, PTH110 - one stat of a file in memory
        raise NotFound(f"network namespace {network_namespace} does not exist: the pod's network is gone")
    command = command_in(network_namespace, "ip")
    four, six = await asyncio.gather(
        _show([*command, "-j"], SHOW_FOUR), _show([*command, "-6", "-j"], SHOW_SIX)
    )
    return read_interfaces(four, six, taps=taps)


async def _show(command: list[str], batch: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        "-batch",
        "-",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
    )
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(batch.encode()), IP_TIMEOUT_S)
    except TimeoutError as error:
        raise TimedOut(f"'{' '.join(command)}' did not end within {IP_TIMEOUT_S:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise Unavailable(f"'{' '.join(command)}' failed: {stderr.decode(errors='replace').strip()}")
    return stdout.decode()
