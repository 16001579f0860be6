"""What the suite is run against: two sockets, and what the one who runs it can do beside the contract."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from sandshift.conformance.answers import Skipped
from sandshift.conformance.side import Side

RESET_S: Final = 300.0


class GuestDoes(enum.Enum):
    """What a guest can be made to do by itself. Values are what a `--guest` command is given."""

    REBOOT = "reboot"
    POWER_OFF = "poweroff"
    WRITE = "write"
    """It writes to its memory without end, faster than that memory can be sent."""


class Target(Protocol):
    """A running sandbox on the source, a shim that awaits one on the destination."""

    @property
    def addresses(self) -> Mapping[Side, str]: ...

    @property
    def limits(self) -> Mapping[str, float]:
        """The limits in force that are short enough to be waited for, by the names of the configuration."""
        ...

    async def reset(self) -> bool:
        """Fresh shims: after a move there is no way back by calls. False if this target cannot."""
        ...

    async def restart(self, side: Side) -> None:
        """Kill the side's shim and start another on what it left. Raises Skipped if this target cannot."""
        ...

    def hold_cancel(self, side: Side) -> contextlib.AbstractAsyncContextManager[None]:
        """Within it a Cancel on this side does not come to its end. Raises Skipped if this target cannot."""
        ...

    async def guest(self, does: GuestDoes) -> None:
        """Make the source's guest do this. WRITE: from now on. The others: by itself, once the session had the time to
        become Transferring; a case calls this before its session begins. Raises Skipped if this target cannot.
        """
        ...

    def silent(self, side: Side) -> contextlib.AbstractAsyncContextManager[None]:
        """Within it the side's VM process lives and answers nothing: not its monitor, not its guest's agent. Raises Skipped
        if this target cannot.
        """
        ...

    @property
    def event_sockets(self) -> Mapping[Side, str]:
        """Where each side's shim sends its events: the suite listens there while a case needs them. Empty if they go nowhere
        that the suite could listen.
        """
        ...

    @property
    def bundle(self) -> str:
        """A folder of this host with an OCI config.json, and the root file system that it names beside it: of a container that
        writes numbered lines of eight digits to its stdout until it is killed. Both shims can read it. Empty: there is none.
        """
        ...

    async def pin(self) -> None:
        """Fresh shims, and the source's sandbox has the annotation `io.microsoft.migration.support-enabled` = "false". Raises
        Skipped if this target cannot.
        """
        ...


@dataclass
class Sockets:
    """Two shims that somebody else started; `reset_command` makes two fresh ones behind the same sockets."""

    source: str
    destination: str
    reset_command: str = ""
    restart_command: str = ""
    """Run with `source` or `destination` as its last word."""
    guest_command: str = ""
    """Run with a value of `GuestDoes` as its last word."""
    silence_command: str = ""
    """Run with `source` or `destination`, and `on` or `off`, as its last words."""
    pin_command: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)
    event_sockets: Mapping[Side, str] = field(default_factory=dict)
    bundle: str = ""

    @property
    def addresses(self) -> Mapping[Side, str]:
        return {Side.SOURCE: self.source, Side.DESTINATION: self.destination}

    async def reset(self) -> bool:
        return bool(self.reset_command) and await _shell(self.reset_command)

    async def restart(self, side: Side) -> None:
        if not self.restart_command:
            raise Skipped("no --restart command: the shims cannot be killed and started again")
        if not await _shell(f"{self.restart_command} {side.name.lower()}"):
            raise Skipped("the --restart command failed")

    @contextlib.asynccontextmanager
    async def hold_cancel(self, side: Side) -> AsyncIterator[None]:
        raise Skipped(f"a cancellation cannot be held up from outside ({side.value})")
        yield

    async def guest(self, does: GuestDoes) -> None:
        if not self.guest_command:
            raise Skipped(f"no --guest command: the guest cannot be made to {does.value}")
        if not await _shell(f"{self.guest_command} {does.value}"):
            raise Skipped("the --guest command failed")

    @contextlib.asynccontextmanager
    async def silent(self, side: Side) -> AsyncIterator[None]:
        command = f"{self.silence_command} {side.name.lower()}"
        if not self.silence_command:
            raise Skipped("no --silence command: the VM cannot be kept from answering")
        if not await _shell(f"{command} on"):
            raise Skipped("the --silence command failed")
        try:
            yield
        finally:
            await _shell(f"{command} off")

    async def pin(self) -> None:
        if not self.pin_command:
            raise Skipped("no --pin command: no sandbox that must not move can be made")
        if not await _shell(self.pin_command):
            raise Skipped("the --pin command failed")


async def _shell(command: str) -> bool:
    """Whether the command succeeded within `RESET_S`."""
    process = await asyncio.create_subprocess_shell(command)
    try:
        async with asyncio.timeout(RESET_S):
            return await process.wait() == 0
    except TimeoutError:
        process.kill()
        await process.wait()
        return False
