"""Applies a plan in one run of ``ip -batch``, all of it or nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import dataclass
from typing import Final

from sandshift.errors import NotSupported, TimedOut
from sandshift.net.complaint import explain, failed_step
from sandshift.net.plan import Plan

IP_TIMEOUT_S: Final = 10.0
"""A run of `ip` takes milliseconds; one that waits for a lock in the kernel shall not hang its caller."""


@dataclass(frozen=True, slots=True)
class _Ran:
    returncode: int
    complaint: str


async def apply(plan: Plan, *, network_namespace: str = "") -> None:
    """Make everything in `plan`, in the named network namespace (empty: the caller's own).

    All or nothing: when a step fails or the call is cancelled, the steps before it are taken back.

    Raises:
        AlreadyThere: a name is taken. NotFound: the bridge or the namespace is missing.
        Rejected: no privilege. NotSupported: no `ip`, no tun. TimedOut: `ip` did not end.
    """
    if not plan.steps:
        return
    running = asyncio.ensure_future(_run_ip(plan.batch(), network_namespace))
    try:
        ran = await asyncio.shield(running)
    except asyncio.CancelledError:
        # It takes milliseconds, and only its own word says which of the names are ours to delete.
        await asyncio.shield(_roll_back(plan, await running, network_namespace))
        raise
    if ran.returncode != 0:
        await _roll_back(plan, ran, network_namespace)
        raise explain(plan, ran.complaint)


async def _roll_back(plan: Plan, ran: _Ran, network_namespace: str) -> None:
    applied = failed_step(plan, ran.complaint) if ran.returncode else None
    if undo := plan.undo_batch(applied):
        await _run_ip(undo, network_namespace, force=True)


async def remove(plan: Plan, *, network_namespace: str = "") -> None:
    """Take back everything in `plan`. What is gone already, and a namespace that is gone, are no error."""
    if undo := plan.undo_batch():
        await _run_ip(undo, network_namespace, force=True)


async def _run_ip(batch: str, network_namespace: str, *, force: bool = False) -> _Ran:
    """One `ip`, fed `batch`. With `force` it goes on after a line that fails."""
    command = [ip_binary()]
    command += ["-n", network_namespace] if network_namespace else []
    command += ["-force"] if force else []
    process = await asyncio.create_subprocess_exec(
        *command,
        "-batch",
        "-",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
    )
    try:
        _, stderr = await asyncio.wait_for(process.communicate(batch.encode()), IP_TIMEOUT_S)
    except TimeoutError as error:
        raise TimedOut(f"'{' '.join(command)}' did not end within {IP_TIMEOUT_S:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _Ran(process.returncode or 0, stderr.decode(errors="replace"))


def ip_binary() -> str:
    """Where `ip` is; a user's PATH often leaves out the sbin folders."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    if found := shutil.which("ip", path=path):
        return found
    raise NotSupported("the program 'ip' is not installed: apt-get install iproute2")
