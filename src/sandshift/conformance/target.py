"""What the suite is run against: two sockets, and what the one who runs it can do beside the contract."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from sandshift.conformance.answers import Skipped
from sandshift.conformance.side import Side

RESET_S: Final = 300.0


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


@dataclass
class Sockets:
    """Two shims that somebody else started; `reset_command` makes two fresh ones behind the same sockets."""

    source: str
    destination: str
    reset_command: str = ""
    restart_command: str = ""
    """Run with `source` or `destination` as its last word."""
    limits: Mapping[str, float] = field(default_factory=dict)

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
