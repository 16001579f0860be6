"""One case's session: how it is brought into each state by public calls alone, and how both shims are wound back."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from google.protobuf import any_pb2

import ttrpc
from sandshift.conformance.answers import OK, Answer, Broken, require
from sandshift.conformance.relay import Relay, descriptor_of
from sandshift.conformance.saved_state import with_containers
from sandshift.conformance.shim import RESUME, STOP, Shim
from sandshift.conformance.side import Side
from sandshift.conformance.target import Target
from sandshift.conformance.tasks import Bundles
from sandshift.wire.migration import options_pb2 as o

STATE_S: Final = 15.0
"""How long a state may take to come."""
LOOK_S: Final = 0.005
DRIP_BYTES: Final = 64
"""The first bytes of a stream pass in pieces of this size, so that a case can stop right behind them."""
DRIPS_ALIKE: Final = 16
DRIP_DOUBLINGS_MAX: Final = 10
DRIPS_MAX: Final = 2000
BACK: Final = {Side.SOURCE: RESUME, Side.DESTINATION: STOP}
FORWARD: Final = {Side.SOURCE: STOP, Side.DESTINATION: RESUME}
LIVE_STATES: Final = ("Finalized", "Failed", "Cancelled")


def here(name: str) -> str:
    """What a container of the source is called on the DST."""
    return f"{name}-moved"


class Scene:
    """Calls on both sides in one session. `moved` says that the sandbox is not where it was: fresh shims are needed."""

    def __init__(self, target: Target, source: Shim, destination: Shim) -> None:
        self.target = target
        self.shims = {Side.SOURCE: source, Side.DESTINATION: destination}
        self.session = f"conformance-{uuid.uuid4()}"
        self.config = any_pb2.Any()
        self.options: o.InitializeOptions | None = None
        self.relay: Relay | None = None
        self._relays: list[Relay] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._others: list[Shim] = []
        self._spoilt = False
        self.bundles = Bundles()
        self.containers: dict[str, Path] = {}
        """Containers that the saved state is made to have, by their ids on the source, and the bundle of each here."""

    @classmethod
    async def open(cls, target: Target) -> Scene:
        addresses = target.addresses
        return cls(
            target,
            await Shim.connect(addresses[Side.SOURCE]),
            await Shim.connect(addresses[Side.DESTINATION]),
        )

    @property
    def src(self) -> Shim:
        return self.shims[Side.SOURCE]

    @property
    def dst(self) -> Shim:
        return self.shims[Side.DESTINATION]

    async def another(self, side: Side) -> Shim:
        """A connection of its own, which the case may drop."""
        shim = await Shim.connect(self.target.addresses[side])
        self._others.append(shim)
        return shim

    async def reconnect(self, side: Side) -> None:
        await self.shims[side].close()
        self.shims[side] = await Shim.connect(self.target.addresses[side])

    async def pinned(self) -> None:
        """From now on with fresh shims, whose sandbox must not move."""
        await self.target.pin()
        self.spoil()
        for side in Side:
            await self.reconnect(side)

    def spoil(self) -> None:
        """The shims are not what they were: the next case needs fresh ones."""
        self._spoilt = True

    def begin(self, work: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
        """A call that goes on beside the case."""
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    def new_relay(self, *, flowing: bool) -> Relay:
        self.relay = Relay(flowing=flowing)
        self._relays.append(self.relay)
        return self.relay

    # Steps

    async def export(self) -> None:
        answer = require(
            await self.src.export(self.session, self.options), OK, what="PrepareAndExportSandbox"
        )
        self.config = answer.response.config

    def have_containers(self, *names: str) -> None:
        """From the next import on the sandbox has these containers, with pids of their own, which run."""
        self.containers = {name: self.bundles.patch_of(name) for name in names}

    async def patch(self, name: str) -> Answer:
        """Task.Create on the DST for a container of the source; here it is called NAME-moved."""
        return await self.dst.tasks.create(self.containers[name], here(name))

    async def imported(self) -> None:
        await self.export()
        if self.containers:
            self.config = with_containers(self.config, self.containers)
        require(await self.dst.import_(self.session, self.config), OK, what="ImportSandbox")

    async def prepared(self) -> None:
        await self.imported()
        for name in self.containers:
            require(await self.patch(name), OK, what=f"Task.Create for {name}")
        require(await self.dst.prepare(self.session, self.options), OK, what="PrepareSandbox")

    async def give_socket(self, side: Side, *, flowing: bool = False) -> None:
        relay = self.relay or self.new_relay(flowing=flowing)
        answer = await self.shims[side].give_socket(self.session, descriptor_of(relay.ends[side]))
        require(answer, OK, what=f"CreateDuplicateSocket on the {side.value}")
        relay.handed(side)

    async def connected(self, *, flowing: bool) -> None:
        await self.prepared()
        for side in Side:
            await self.give_socket(side, flowing=flowing)

    async def transferred(self) -> None:
        """Everything is on the destination, nothing is decided."""
        await self.connected(flowing=True)
        answers = await asyncio.gather(*(self.shims[side].transfer(self.session) for side in Side))
        for side, answer in zip(Side, answers, strict=True):
            require(answer, OK, what=f"TransferSandbox on the {side.value}")
            await self.wait_for(side, "TransferCompleted")

    async def moved(self) -> None:
        await self.transferred()
        require(await self.dst.finalize(self.session, RESUME), OK, what="FinalizeSandbox(RESUME) on the DST")
        require(await self.src.finalize(self.session, STOP), OK, what="FinalizeSandbox(STOP) on the SRC")

    # States

    async def wait_for(self, side: Side, *states: str, within_s: float = STATE_S) -> str:
        state = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while (state := await self.shims[side].state()) not in states:  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(LOOK_S)
                return state
        raise Broken(
            f"the {side.value} did not become {' or '.join(states)} within {within_s:g} s: it is {state}"
        )

    async def reach(self, state: str, side: Side) -> None:
        """Bring this case's session, on this side, into `state`."""
        await getattr(self, f"_reach_{state.lower()}")(side)
        await self.wait_for(side, state)

    async def _reach_idle(self, side: Side) -> None:
        """After another session: so that the side, and that session's end, are known to the shim."""
        former = self.session
        await (self.export() if side is Side.SOURCE else self.imported())
        for ended in Side:
            if await self.shims[ended].state() != "Idle":
                require(await self.shims[ended].cancel(former), OK, what="Cancel")
                require(await self.shims[ended].cleanup(former), OK, what="Cleanup")
        self.session = f"conformance-{uuid.uuid4()}"

    async def _reach_sourceexported(self, _side: Side) -> None:
        await self.export()

    async def _reach_destinationimported(self, _side: Side) -> None:
        await self.imported()

    async def _reach_destinationprepared(self, _side: Side) -> None:
        await self.prepared()

    async def _one_side(self, side: Side) -> None:
        await (self.export() if side is Side.SOURCE else self.prepared())

    async def _reach_socketwaiting(self, side: Side) -> None:
        await self._one_side(side)
        self.begin(self.shims[side].transfer(self.session))

    async def _reach_socketready(self, side: Side) -> None:
        await self._one_side(side)
        await self.give_socket(side)

    async def _reach_transferring(self, side: Side) -> None:
        if side is Side.SOURCE:
            await self._reach_socketready(side)
            self.begin(self.src.transfer(self.session))
            return
        await self.connected(flowing=False)
        self.begin(self.src.transfer(self.session))
        await self.drip_until_transferring(side)

    async def drip_until_transferring(self, side: Side) -> None:
        """Let the first bytes of the stream pass, and no more, while both sides transfer."""
        assert self.relay is not None
        state = ""
        for drip in range(DRIPS_MAX):
            if (state := await self.shims[side].state()) not in ("SocketReady", "SocketWaiting"):
                break
            self.relay.drip(DRIP_BYTES << min(drip // DRIPS_ALIKE, DRIP_DOUBLINGS_MAX))
            await asyncio.sleep(LOOK_S)
        self.relay.hold()
        if state != "Transferring":
            raise Broken(
                f"the {side.value} became {state} while only a part of the stream had been let through"
            )

    async def _reach_transfercompleted(self, _side: Side) -> None:
        await self.transferred()

    async def _reach_cancelled(self, side: Side) -> None:
        await (self.export() if side is Side.SOURCE else self.imported())
        require(await self.shims[side].cancel(self.session), OK, what="Cancel")

    async def _reach_failed(self, side: Side) -> None:
        await self._reach_transferring(side)
        assert self.relay is not None
        self.relay.cut()

    async def _reach_finalized(self, side: Side) -> None:
        await self._reach_cancelled(side)
        answer = await self.shims[side].finalize(self.session, BACK[side])
        require(answer, OK, what="FinalizeSandbox going back from Cancelled")

    # The end

    async def close(self, within_s: float) -> bool:
        """Wind both sides back by public calls. False if they are not as they were: fresh ones are needed."""
        try:
            async with asyncio.timeout(within_s):
                return await self._wind_back() and not self._spoilt
        except (ttrpc.StatusError, Broken, OSError, TimeoutError):
            return False
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for relay in self._relays:
                await relay.close()
            for shim in (*self.shims.values(), *self._others):
                await shim.close()
            self.bundles.close()

    async def _wind_back(self) -> bool:
        for relay in self._relays:
            relay.flow()
        for side, shim in self.shims.items():
            session = (await shim.sandbox_status()).info.get("migration.session", self.session)
            state = await shim.state()
            if state == "Idle":
                continue
            if state not in LIVE_STATES:
                await shim.finalize(session, BACK[side])
            if await shim.state() != "Idle":
                await shim.cleanup(session)
        for name in self.containers:
            await self.dst.tasks.delete(here(name))
        return await self._as_it_was()

    async def _as_it_was(self) -> bool:
        source, destination = await self.src.status(), await self.dst.status()
        states = (await self.src.state(), await self.dst.state())
        return states == ("Idle", "Idle") and (source.vm_state, destination.vm_state) == ("running", "absent")
