"""Applies a plan in one run of ``ip -batch`` (and one of ``tc -batch`` where it has such steps), all of it or nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import dataclass
from typing import Final

from sandshift.errors import NotSupported, SandshiftError, TimedOut
from sandshift.net.complaint import explain, failed_step
from sandshift.net.plan import Plan

IP_TIMEOUT_S: Final = 10.0
"""A run of `ip` takes milliseconds; one that waits for a lock in the kernel shall not hang its caller."""


@dataclass(frozen=True, slots=True)
class _Ran:
    returncode: int
    complaint: str


@dataclass(frozen=True, slots=True)
class _Outcome:
    applied: int | None
    """How many steps hold; None: not known."""
    error: SandshiftError | None = None


async def apply(plan: Plan, *, network_namespace: str = "") -> None:
    """Make everything in `plan`, in a network namespace: a name, or its file's path (empty: the caller's own).

    All or nothing: when a step fails or the call is cancelled, the steps before it are taken back.

    Raises:
        AlreadyThere: a name is taken. NotFound: the bridge or the namespace is missing.
        Rejected: no privilege. NotSupported: no `ip`, no tun. TimedOut: `ip` did not end.
    """
    if not plan.steps:
        return
    running = asyncio.ensure_future(_apply(plan, network_namespace))
    try:
        outcome = await asyncio.shield(running)
    except asyncio.CancelledError:
        # It takes milliseconds, and only its own word says which of the names are ours to delete.
        await asyncio.shield(_undo(plan, network_namespace, (await running).applied))
        raise
    if outcome.error is not None:
        await _undo(plan, network_namespace, outcome.applied)
        raise outcome.error


async def _apply(plan: Plan, network_namespace: str) -> _Outcome:
    applied = 0
    for program, part in plan.stages():
        ran = await _run(program, part.batch(), network_namespace)
        if ran.returncode != 0:
            failed = failed_step(part, ran.complaint)
            return _Outcome(None if failed is None else applied + failed, explain(part, ran.complaint))
        applied += len(part.steps)
    return _Outcome(applied)


async def _undo(plan: Plan, network_namespace: str, applied: int | None) -> None:
    for program, batch in plan.undo_batches(applied):
        await _run(program, batch, network_namespace, force=True)


async def remove(plan: Plan, *, network_namespace: str = "") -> None:
    """Take back everything in `plan`. What is gone already, and a namespace that is gone, are no error."""
    await _undo(plan, network_namespace, None)


def command_in(network_namespace: str, program: str) -> list[str]:
    """The beginning of a command line that runs `ip` or `tc` in a namespace: a name, a path, or empty for here."""
    if network_namespace.startswith("/"):
        return [binary("nsenter"), f"--net={network_namespace}", binary(program)]
    return [binary(program), *(["-n", network_namespace] if network_namespace else [])]


async def _run(program: str, batch: str, network_namespace: str, *, force: bool = False) -> _Ran:
    """One run, fed `batch`. With `force` it goes on after a line that fails."""
    command = command_in(network_namespace, program) + (["-force"] if force else [])
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


def binary(program: str) -> str:
    """Where a program is; a user's PATH often leaves out the sbin folders.

    Raises:
        NotSupported: it is not installed; says which package has it.
    """
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    if found := shutil.which(program, path=path):
        return found
    package = "util-linux" if program == "nsenter" else "iproute2"
    raise NotSupported(f"the program '{program}' is not installed: apt-get install {package}")
